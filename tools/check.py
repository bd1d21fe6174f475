"""Is facet.py right? Is any potential? The table of properties, and what checks and tests share.

    python -m tools.check           is facet.py right? (about 7 s)
    python -m tools.check --help    a trained model, any calculator

`python test_facet.py` is the same command. Every tolerance stands in TOL with its reason. Models
are in float64, every weight is random and none is zero. The properties themselves are functions of
tools/properties.py. Neither file needs pytest or hypothesis.
"""
from __future__ import annotations

import argparse
import ast
import copy
import importlib
import sys
from dataclasses import asdict, replace
from functools import cache, partial
from math import isqrt
from timeit import repeat
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError

import facet
import reference_numpy
from tools.files import read_atoms
from tools.options import check_device
from tools.properties import (
    ALL,
    NotApplicable,
    alone_or_in_a_batch,
    conservation_error,
    cutoff_continuity,
    folding,
    force_slope,
    isolated_atom,
    other_cell,
    permutation,
    random_alloy,
    random_crystal,
    reflection,
    rotation,
    stress_slope,
    supercell,
    translation,
    value,
)

TOL = {  # largest allowed error, in units of the largest wanted value (of 1, if that is smaller)
    "exact": 0,              # the same numbers, to the last bit
    "formula": 1e-12,        # one formula against another, float64, no layers in between
    "rounding": 1e-10,       # the same sums in another order, float64, through three layers
    "slope": 1e-6,           # central differences; third derivatives jump at a knot of a spline
    "cutoff": 1e-4,          # what is left 1e-3 Å inside; a jump would be at least 1e-2
    "silu grid": 1e-8,       # SiLU is no polynomial: what the largest rule leaves, three layers
    "silu": 0.05,            # and what the default rule leaves
    "drift": 0.02,           # total energy in a short NVE, over the kinetic energy at the start
    "float32 formula": 1e-6, # one formula against another in float32
    "float32": 1e-4,         # 7 digits; layers and sums over neighbours cost one or two of them
    "float32 slope": 2e-2,   # a step of 0.01 Å, so that seven digits of energy make a slope
    "float32 cutoff": 1e-2,  # what is left where seven digits begin to see the neighbour
    "text file": 1e-6,       # files of text hold eight decimals
    "meV": 1e-3,             # an energy difference in eV, however large the energies
    "spline fit": 0.02,      # what 24 splines leave of a sine-Bessel function
    "moment": 0.25,          # of features made from unit variance: sampling, and no factor of 2
    "bfloat16": 5e-3,        # Muon makes its steps rotations in bfloat16: twenty of them
    "control": 1e-2,         # what a control must at least differ by
}


# ─── Comparisons ─────────────────────────────────────────────────────────────────────────────────


def as_numpy(values) -> np.ndarray:
    """Numbers or a tensor on any device as float64."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    return np.asarray(values, float)


def largest(got, want) -> tuple[float, tuple]:
    """Largest error, in the units of TOL, and where. What is nan on either side is infinitely off:
    nothing is compared with what is no number."""
    got = as_numpy(got)
    want = as_numpy(want)
    assert got.shape == want.shape, f"shape {got.shape}, not {want.shape}"
    if got.size == 0:
        return 0.0, ()

    with np.errstate(invalid="ignore"):
        error = np.abs(got - want) / max(1, np.nanmax(np.abs(want), initial=0))
    error = np.where(np.isnan(error), np.inf, error)
    where = np.unravel_index(error.argmax(), error.shape)
    return float(error.max()), tuple(int(i) for i in where)


def same(what: str, got, want, tol: str = "rounding") -> float:
    """Fail unless got is want; returns the error."""
    error, where = largest(got, want)
    allowed = f"allowed {TOL[tol]:.0e} ({tol})"
    assert error <= TOL[tol], f"{what}: off by {error:.1e} at {where}, {allowed}"
    return error


def differ(what: str, got, want) -> None:
    """A control: fail if got is want, or nearly, or either is no number."""
    error, where = largest(got, want)
    assert TOL["control"] < error < np.inf, (
        f"{what}: differs by {error:.1e}, at {where}, so this check proves nothing")


# ─── Tiny models and crystals ────────────────────────────────────────────────────────────────────


CUTOFF = 3.5
CONFIG = facet.Config(
    species=("Si", "O", "Cu"), cutoff=CUTOFF, degree=2, channels=6, layers=3, groups=3, splines=12,
    mean_neighbours=8.0, energy_scale=1.5, reference_energies=(-1.0, 2.0, 0.5))
MODELS = {
    "L=2": {},
    "L=1, one layer": {"degree": 1, "layers": 1},
    "L=3, first knot": {"degree": 3, "first_knot": 1.0},
    "L=0": {"degree": 0},
    "L=4, two layers": {"degree": 4, "layers": 2, "channels": 4, "groups": 4},
    "atoms within the core": {"core": (1.3, 1.2, 1.1)},
    "no core, no E0": {"core": (0.0, 0.0, 0.0), "reference_energies": ()},
    "silu": {"activation": "silu"},
    "silu, fine": {"activation": "silu", "grid_degree": 131},
}


@cache
def build(dtype=torch.float64, seed=0, **changes) -> facet.Facet:
    """A tiny model, the same one for the same arguments: copy it before you change it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = facet.Facet(replace(CONFIG, **changes), dtype)
        with torch.no_grad():
            for weights in model.parameters():  # biases and splines too
                noise = torch.randn(weights.shape, dtype=torch.float64)
                weights += 0.1 * noise.to(dtype)
    return model


def batch_of(model, *crystals: Atoms) -> facet.Batch:
    neighbours = [facet.find_neighbours(atoms, model.config) for atoms in crystals]
    weights = next(model.parameters())
    return facet.make_batch(neighbours, model.config.cutoff, weights.dtype).to(weights.device)


def outputs(model, *crystals: Atoms) -> dict[str, np.ndarray]:
    """What the model says of a batch, as NumPy."""
    out = model(batch_of(model, *crystals))
    return {name: tensor.cpu().numpy() for name, tensor in out.items()}


def features(model, atoms: Atoms) -> dict:
    """What the parts of every layer put out: (t, part) → [N, M, C], a density [N, J, C]."""
    found = {}
    hooks = []
    for t, layer in enumerate(model.layers):
        for part in ("density", "mix", "skip", "grid"):
            def keep(module, inputs, output, key=(t, part)):
                found[key] = as_numpy(output)[:len(atoms)]
            hooks.append(getattr(layer, part).register_forward_hook(keep))
    outputs(model, atoms)
    for hook in hooks:
        hook.remove()
    return found


TRICLINIC = Atoms("SiOCuSiO", [[0.1, 0.2, 0.0], [1.9, 0.3, 0.4], [0.4, 2.1, 0.3],
                               [0.2, 0.5, 2.3], [2.2, 2.6, 2.4]],
                  cell=[[4.1, 0.3, -0.2], [1.1, 3.9, 0.4], [-0.7, 0.9, 4.4]], pbc=True)
SMALL = Atoms("SiO", [[0, 0, 0], [1.4, 1.1, 1.3]],
              cell=[[3.4, 0.2, 0], [0.6, 3.5, 0.3], [-0.4, 0.1, 3.3]], pbc=True)


# ─── Facet against the second implementation, its weights against differences ────────────────────


def ladder(model, atoms: Atoms, derivatives: bool = False) -> dict[str, float]:
    """Every stage of the model against reference_numpy.py: the largest error of each, over the
    largest value of the stage or 1. Forces and stress (slow) if `derivatives`."""
    state = {name: as_numpy(tensor) for name, tensor in model.state_dict().items()}
    crystal = (asdict(model.config), state, [*atoms.symbols],
               atoms.positions, atoms.cell.array, atoms.pbc)
    want = reference_numpy.evaluate(*crystal)
    out = outputs(model, atoms)
    found = features(model, atoms)

    # Edges in one order, then what belongs to each edge.
    dst, src, shift, vectors = facet.neighbour_list(
        atoms.positions, atoms.cell.array, atoms.pbc, model.config.cutoff)
    edges = np.c_[dst, src, shift]  # [E, 5]
    wanted = np.c_[want["dst"], want["src"], want["shift"]]  # [E, 5]
    order, other = np.lexsort(edges.T), np.lexsort(wanted.T)
    steps = {"edges": largest(edges[order], wanted[other])[0]}
    if steps["edges"]:
        return steps  # the rest cannot be compared
    r = torch.from_numpy(vectors[order]).to(model.E0.device)  # [E, 3]
    phi = model.splines(r.norm(dim=1)).reshape(want["phi"].shape)
    Y = facet.harmonics(r / r.norm(dim=1, keepdim=True), model.config.degree)
    steps["vectors"] = largest(r, want["vectors"][other])[0]
    steps["phi"] = largest(phi, want["phi"][other])[0]
    steps["Y"] = largest(Y, want["Y"][other])[0]

    # Layer by layer.
    for t in range(model.config.layers):
        shape = len(atoms), -1, model.config.channels  # [N, m3 Q, C]
        A = np.concatenate([a.reshape(shape) for a in want["A"][t]], 1)  # [N, J, C]
        steps[f"layer {t} density"] = largest(found[t, "density"], A)[0]
        for part, name in (("mix", "message"), ("skip", "skip"), ("grid", "h")):
            steps[f"layer {t} {part}"] = largest(found[t, part], want[name][t])[0]

    # What comes out.
    steps["energies"] = largest(out["energies"], want["energies"])[0]
    steps["energy"] = largest(out["energy"], [want["energy"]])[0]
    if derivatives:
        steps["forces"] = largest(out["forces"], reference_numpy.forces(*crystal))[0]
        steps["stress"] = largest(out["stress"][0], reference_numpy.stress(*crystal))[0]
    return steps


def weight_slope(model, batch, of: str, seed: int = 0, step: float = 1e-6) -> float:
    """The gradient of an output for the weights is its slope: along a random direction of all
    weights, for a random sum over the output's elements; relative to the slope."""
    generator = torch.Generator().manual_seed(seed)
    weights = list(model.parameters())
    direction = [torch.randn(w.shape, dtype=w.dtype, generator=generator) for w in weights]
    factors = torch.randn(model(batch)[of].shape, dtype=torch.float64, generator=generator)

    # The same numbers on any device
    direction = [d.to(batch.vectors.device) for d in direction]
    factors = factors.to(batch.vectors.device)

    def total(differentiable=False):
        return (factors * model(batch, differentiable=differentiable)[of]).sum()

    # The slope by the gradient
    gradient = torch.autograd.grad(total(True), weights, allow_unused=True)
    got = 0.0
    for g, d in zip(gradient, direction, strict=True):
        got += 0 if g is None else float((g * d).sum())

    # The slope by differences; afterwards the weights are what they were
    values = []
    with torch.no_grad():
        for change in (step, -2 * step):
            for w, d in zip(weights, direction, strict=True):
                w += change * d
            values.append(float(total()))
        for w, d in zip(weights, direction, strict=True):
            w += step * d
    wanted = (values[0] - values[1]) / (2 * step)
    return abs(got - wanted) / max(1.0, abs(wanted))


def empty_places(model, atoms: Atoms) -> float:
    """Places beyond the cutoff, as padding has them, add nothing to energies and forces. eV/Å."""
    batch = batch_of(model, atoms)
    N = len(batch.species)
    itself = torch.arange(N, device=batch.src.device)[:, None].expand(N, 5)  # [N, 5]
    beyond = batch.vectors.new_tensor([0, 2 * model.config.cutoff, 0]).expand(N, 5, 3)  # [N, 5, 3]
    wider = batch._replace(
        src=torch.cat([batch.src, itself], 1),  # [N, K+5]
        vectors=torch.cat([batch.vectors, beyond], 1),  # [N, K+5, 3]
    )
    before = model(batch)
    after = model(wider)
    return max(largest(after[name], before[name])[0] for name in ("energies", "forces"))


def moments(model, atoms: Atoms) -> list[str]:
    """Second moments of the features after each stage, one line a layer, l = 0 1 2 …"""
    found = features(model, atoms)
    lines = []
    for t in range(model.config.layers):
        stages = []
        for part in ("mix", "skip", "grid"):
            if (t, part) not in found:
                continue  # a layer of yours may lack one
            x = found[t, part]
            by_degree = [np.square(x[:, facet.rows_of(l)]).mean() for l in range(isqrt(x.shape[1]))]
            stages.append(part + "".join(f" {moment:5.2f}" for moment in by_degree))
        lines.append(f"  layer {t}  " + "   ".join(f"{stage:23}" for stage in stages).rstrip())
    return lines


# ─── Rows of the table ───────────────────────────────────────────────────────────────────────────


class Row(NamedTuple):
    """A line of the table. An error is None where there is nothing to measure."""

    name: str
    errors: tuple  # of energy eV/atom, forces eV/Å, stress eV/Å³
    limit: float   # what they should be below
    note: str = ""

    @property
    def wrong(self) -> bool:
        for error in self.errors:
            if error is not None and not error <= self.limit:  # nan is wrong, too
                return True
        return self.limit < 0  # an exception where none belongs


def slope(calculator, atoms: Atoms, of, step: float = 2e-5) -> list[float]:
    """force_slope and stress_slope, as `of` says."""
    functions = {"forces": force_slope, "stress": stress_slope}
    return [functions[name](calculator, atoms, step=step) for name in of]


def short_dynamics(calculator, atoms: Atoms, of) -> list[float]:
    """25 fs, in shorter steps if the atoms are too fast: forces that are no slopes do not mind."""
    for steps in (50, 100, 200):
        error = conservation_error(calculator, atoms, steps=steps, femtoseconds=25 / steps)
        if not error >= TOL["drift"]:  # shorter steps do not mend nan
            break
    return [error]


PROPERTIES = {  # name: (function, what it is measured in, tolerance)
    "rotation": (rotation, ALL, "rounding"),
    "reflection": (reflection, ALL, "rounding"),
    "translation": (translation, ALL, "rounding"),
    "permutation": (permutation, ALL, "rounding"),
    "another cell of the lattice": (other_cell, ALL, "rounding"),
    "supercell": (supercell, ALL, "rounding"),
    "atoms folded or not": (folding, ALL, "rounding"),
    "alone or in a batch": (alone_or_in_a_batch, ALL, "rounding"),
    "slope of the energy": (slope, ("forces", "stress"), "slope"),
    "jump at the cutoff": (cutoff_continuity, ("energy", "forces"), "cutoff"),
    "isolated atom": (isolated_atom, ALL, "rounding"),
    "conservation, part of kinetic": (short_dynamics, ("energy",), "drift"),
}
FLOAT32 = {  # tolerance in float64: (in float32, what the function must know of it)
    "rounding": ("float32", {}),
    "slope": ("float32 slope", {"step": 0.01}),
    "cutoff": ("float32 cutoff", {"noise": 1e-5}),
    "drift": ("drift", {}),
}
NOTHING = (None, None, None)


def property_row(name: str, calculator, atoms: Atoms, precision: str = "float64") -> Row:
    """One line of the table. What a calculator cannot do is noted; Facet has to do everything."""
    # What is allowed
    function, parts, tolerance = PROPERTIES[name]
    more = {}
    if precision == "float32":
        tolerance, more = FLOAT32[tolerance]
    ours = isinstance(calculator, facet.FacetCalculator)
    if ours and calculator.model.config.activation == "silu" and name in ("rotation", "reflection"):
        tolerance = "silu"

    try:
        # What the calculator gives of what the property is about; forces set the scale
        given = {}
        for of in {**dict.fromkeys(parts), "forces": None}:
            try:
                if of != "stress" or atoms.cell.rank == 3:
                    given[of] = value(calculator, atoms, of)
            except (PropertyNotImplementedError, NotImplementedError):
                if ours:
                    raise
        for of, values in given.items():
            if not np.isfinite(values).all():
                return Row(name, NOTHING, -1.0, f"{of}: nan or infinite")
        measured = [of for of in parts if of in given]

        size = 1.0
        if tolerance != "drift" and "forces" in given:
            size = max(1.0, float(np.abs(given["forces"]).max()))
        found = function(calculator, atoms, of=measured, **more) if measured else []
        errors = dict(zip(measured, map(float, found), strict=True))
        return Row(name, tuple(errors.get(of) for of in ALL), TOL[tolerance] * size)
    except NotApplicable as reason:
        return Row(name, NOTHING, 0.0, f"not applicable: {reason}")
    except Exception as error:
        return Row(name, NOTHING, -1.0 if ours else 0.0, in_short(error))


def in_short(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:90]


GUARD = {"cutoff": 5.0, "channels": 32, "groups": 8, "splines": 24, "mean_neighbours": 30.0,
         "energy_scale": 0.03, "core": (1.0, 0.9, 0.8)}  # Facet's default sizes
WIDE_CORE = (1.3, 1.2, 1.1)  # Å; the crystals below have atoms within each other's core


def guard_calculator(device: str = "cpu") -> facet.FacetCalculator:
    return facet.FacetCalculator(build(**GUARD), device, torch.float64)


def ladder_row(device: str) -> Row:
    name = "equals reference_numpy.py"
    model = copy.deepcopy(build(**{**GUARD, "core": WIDE_CORE})).to(device)
    try:
        steps = ladder(model, SMALL)
    except (AssertionError, KeyError, ValueError) as error:
        note = f"that file has another network; change it, too ({in_short(error)})"
        return Row(name, NOTHING, -1.0, note)
    broken = [stage for stage, error in steps.items() if not error <= TOL["rounding"]]
    note = f"breaks at {broken[0]}" if broken else f"{len(steps)} stages"
    errors = (float(np.max([*steps.values()])), None, None)  # nan stays nan
    return Row(name, errors, TOL["rounding"], note)


def weight_row(activation: str, device: str) -> Row:
    model = copy.deepcopy(build(activation=activation, core=WIDE_CORE)).to(device)
    batch = batch_of(model, TRICLINIC, SMALL)
    errors = tuple(weight_slope(model, batch, of) for of in ("energy", "forces", "virial"))
    return Row(f"gradients for weights, {activation}", errors, TOL["slope"])


def empty_row(device: str) -> Row:
    error = empty_places(copy.deepcopy(build(**GUARD)).to(device), TRICLINIC)
    return Row("empty places", (None, error, None), TOL["rounding"])


PARTS = {  # rows about Facet's own parts, functions of the device
    "equals reference_numpy.py": ladder_row,
    "gradients for weights, product": partial(weight_row, "product"),
    "gradients for weights, silu": partial(weight_row, "silu"),
    "empty places": empty_row,
}


def guard_row(name: str, device: str = "cpu") -> Row:
    """One row of `python -m tools.check`; an exception is an error, too."""
    try:
        if name in PROPERTIES:
            return property_row(name, guard_calculator(device), TRICLINIC)
        return PARTS[name](device)
    except Exception as error:
        return Row(name, NOTHING, -1.0, in_short(error))


def guard() -> list[Row]:
    """The wrong rows of `python -m tools.check`: none if all is right."""
    rows = [guard_row(name) for name in (*PROPERTIES, *PARTS)]
    return [row for row in rows if row.wrong]


# ─── The table and the command line ──────────────────────────────────────────────────────────────


HEADER = f"{'property':33}{'energy':>9}{'forces':>9}{'stress':>9}  should be"


def line(row: Row) -> str:
    """A row as text."""
    cells = []
    for error in row.errors:
        cells.append(f"{'-':>9}" if error is None else f"{error:9.1e}")
    limit = f"below {row.limit:.0e}" if row.limit > 0 else ""
    verdict = "WRONG" if row.wrong else "ok"
    if not row.wrong and row.errors == NOTHING:
        verdict = "-"
    return f"{row.name:33}{''.join(cells)}  {limit:12}  {verdict:5}  {row.note}".rstrip()


def table(title: str, rows) -> int:
    """Print rows as they come; returns how many are wrong."""
    print(title)
    print(HEADER)
    wrong = 0
    for row in rows:
        print(line(row), flush=True)
        wrong += row.wrong
    return wrong


def check_facet(device: str) -> int:
    """`python -m tools.check`: the table for a Facet with random weights, and what it costs."""
    cuda = device.startswith("cuda")
    where = torch.cuda.get_device_name(device) if cuda else device.upper()
    print(f"Facet on {where}, threads: {torch.get_num_threads()}, torch {torch.__version__}")
    wrong = table("float64, random weights, errors in eV per atom, eV/Å, eV/Å³",
                  (guard_row(name, device) for name in (*PROPERTIES, *PARTS)))
    print(f"{wrong} wrong" if wrong else "all is right")

    # What is not right or wrong: sizes of signals, parameters, speed.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        fresh = facet.Facet(facet.Config(("C", "Si"), mean_neighbours=28.0), torch.float64)
    fresh.to(device)
    print("second moments of a fresh model's features, l = 0 1 2: near 1 where signals neither die "
          "nor explode")
    for text in moments(fresh, random_alloy(64)):
        print(text)
    model = copy.deepcopy(fresh).float()
    print("parameters", sum(p.numel() for p in model.parameters()))
    for atoms in (8, 64, 512):
        neighbours = facet.find_neighbours(random_alloy(atoms), model.config)
        batch = facet.make_batch([neighbours], model.config.cutoff).to(device)

        def call(batch=batch):
            model(batch)["energy"].tolist()  # waits for the device

        seconds = repeat(call, number=1, repeat=4)[1:]
        print(f"speed {atoms:4d} atoms, float32: {1000 * np.median(seconds):.1f} ms")
    return wrong


def given_calculator(words: list[str], dtype: str, device: str):
    """The calculators that the words after --calculator name: [(title, calculator, precision)].

    Raises SystemExit with one sentence if there are none.
    """
    # A checkpoint, in each precision
    spec, *options = words
    if spec.endswith(".pt"):
        if options:
            raise SystemExit(f"error: a checkpoint takes no {options[0]}")
        found = []
        for name in [dtype] if dtype else ["float64", "float32"]:
            try:
                calculator = facet.FacetCalculator(spec, device, getattr(torch, name))
            except (OSError, ValueError) as error:
                raise SystemExit(f"error: {error}") from None
            found.append((f"{spec}, {name}", calculator, name))
        return found

    # Keyword arguments are numbers, True, False, None or text
    keywords = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise SystemExit(f"error: {option} is not key=value")
        try:
            keywords[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            keywords[key] = text

    # Whatever the callable makes of them
    module, colon, name = spec.partition(":")
    if not colon:
        raise SystemExit(f"error: {spec} is neither a .pt file nor module:callable, such as "
                         "ase.calculators.emt:EMT")
    try:
        calculator = getattr(importlib.import_module(module), name)(**keywords)
    except Exception as error:
        raise SystemExit(f"error: {spec} cannot be made: {in_short(error)}") from None
    if not hasattr(calculator, "get_property"):
        raise SystemExit(f"error: {spec} makes no ASE calculator")
    return [(f"{spec}, limits of {dtype or 'float32'}", calculator, dtype or "float32")]


def check_calculator(words: list[str], dtype: str, device: str, file: str,
                     species: list[str]) -> int:
    """`python -m tools.check --calculator …`; returns how many rows are wrong."""
    wrong = 0
    for title, calculator, precision in given_calculator(words, dtype, device):
        if isinstance(calculator, facet.FacetCalculator):
            known = species or calculator.model.config.species
        else:
            known = species or ("Cu", "Al")

        try:
            atoms = next(read_atoms(file)) if file else random_crystal(known)
            value(calculator, atoms, "energy")
        except Exception as error:
            where = file or f"a crystal of {' '.join(known)} (try --species or --atoms)"
            raise SystemExit(f"error: no energy of {where}: {in_short(error)}") from None

        wrong += table(f"{title}, {atoms.symbols}; errors in eV per atom, eV/Å, eV/Å³",
                       (property_row(name, calculator, atoms, precision) for name in PROPERTIES))
        print()
    print(f"{wrong} wrong" if wrong else "all is right")
    return wrong


EXAMPLES = """examples:
    %(prog)s                                        is facet.py right?
    %(prog)s --device cuda                          is it on a GPU?
    %(prog)s --calculator runs/si/model.pt          a trained model
    %(prog)s --calculator ase.calculators.emt:EMT   any calculator, module:callable
    %(prog)s --calculator chgnet.model:CHGNetCalculator use_device=cpu --atoms crystal.cif
"""


def main(program: str = "python -m tools.check") -> int:
    """The command line of `program`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Print the properties of Facet, or of any ASE calculator, with their errors.")
    parser.add_argument("--calculator", nargs="+", metavar="SPEC", help="a .pt file, or "
                        "module:callable and key=value for its keyword arguments")
    parser.add_argument("--atoms", default="", metavar="FILE",
                        help="file with the crystal; default: a built-in one")
    parser.add_argument("--species", nargs="+", default=[], help="elements of the built-in crystal")
    parser.add_argument("--dtype", default="", choices=["float32", "float64"],
                        help="precision to judge by; default: both for a .pt file, else float32")
    parser.add_argument("--device", default="", help="where a Facet runs; default: cpu, a trained "
                        "model on cuda if there is one")
    arguments = parser.parse_args()
    check_device(parser, arguments.device or "cpu")

    if arguments.calculator:
        if arguments.device and not arguments.calculator[0].endswith(".pt"):
            parser.error("--device is for Facet; other calculators take theirs as key=value")
        wrong = check_calculator(arguments.calculator, arguments.dtype, arguments.device,
                                 arguments.atoms, arguments.species)
    else:
        wrong = check_facet(arguments.device or "cpu")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
