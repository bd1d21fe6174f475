"""Is facet.py right? Is any potential? The table of properties, and what checks and tests share.

    python -m tools.check           is facet.py right? (about 7 s)
    python -m tools.check --help    a trained model, any calculator

`python test_facet.py` is the same command. Every tolerance stands in TOL with its reason. Models
are in float64, every weight is random and none is zero. The properties themselves are functions of
tools/properties.py. Neither file needs pytest or hypothesis.
"""
from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import asdict, replace
from functools import cache, partial
from math import isqrt
from time import monotonic
from timeit import repeat
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError

import facet
import reference_numpy
from tools.options import check_device
from tools.potentials import CannotBegin, Watched, given_calculators, in_short, structures
from tools.properties import (
    ALL,
    Fault,
    NotApplicable,
    NothingToSee,
    alone_or_in_a_batch,
    conservation_error,
    cutoff_continuity,
    facet_of,
    far_sight,
    folding,
    force_slope,
    history,
    isolated_atom,
    open_axis,
    other_cell,
    permutation,
    random_alloy,
    reflection,
    rotation,
    strangers,
    stress_slope,
    supercell,
    time_step,
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
    "self-consistent": 1e-4, # what iterations that start where the last crystal ended may leave
    "far": 1e-4,             # the same where atoms see each other beyond 27 Å: images do, too
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


NOTHING = (None, None, None)
WRONG, BROKE, OK = "WRONG", "BROKE", "ok"
BLIND, NOT_ASKED = "nothing to see", "not asked"


class Row(NamedTuple):
    """A line of the table. An error is None where there is nothing to measure."""

    name: str
    errors: tuple = NOTHING  # of energy eV/atom, forces eV/Å, stress eV/Å³
    limit: float = 0.0       # what they should be below
    note: str = ""
    sizes: tuple = NOTHING   # the largest energy, force, stress of the crystal: the control
    told: str = ""           # the verdict where errors do not make it
    stress_limit: float | None = None  # where that is another one

    @property
    def verdict(self) -> str:
        """One of the five above."""
        of_stress = self.limit if self.stress_limit is None else self.stress_limit
        limits = (self.limit, self.limit, of_stress)
        for error, limit in zip(self.errors, limits, strict=True):
            if error is not None and not error <= limit:  # nan is wrong, too
                return WRONG
        return self.told or OK

    @property
    def wrong(self) -> bool:
        return self.verdict in (WRONG, BROKE)


def slope(calculator, atoms: Atoms, of, steps=(2e-5, 1e-3), step_of_energy=1e-4) -> list[float]:
    """force_slope and stress_slope, as `of` says: the better of two steps of the differences, for
    the shorter one sees noise. If the longer one finds a step of the energy (eV), its error."""
    functions = {"forces": (force_slope, 1), "stress": (stress_slope, abs(atoms.cell.volume))}
    errors = []
    for name in of:
        function, volume = functions[name]
        short, long = [function(calculator, atoms, step=step) for step in steps]
        jumps = not long * volume * 2 * steps[1] <= step_of_energy  # nan, too
        if jumps and function(calculator, atoms, step=steps[1] / 2) < long / 2:
            jumps = False
        errors.append(long if jumps else min(short, long))
    return errors


def short_dynamics(calculator, atoms: Atoms, of) -> list[float]:
    """24 steps; if the energy is not kept, the same time in steps half as long, and again. An error
    that falls by four each time is that of the steps, and what would remain is the row's."""
    step = time_step(calculator, atoms)
    remains, last = np.inf, None
    for n in (1, 2, 4):
        error = conservation_error(calculator, atoms, steps=24 * n, femtoseconds=step / n)
        remains = error if last is None else min(error, abs(4 * error - last) / 3)
        if not remains > TOL["drift"]:  # shorter steps do not mend nan
            break
        last = error
    return [remains]


def three_other_cells(calculator, atoms: Atoms, of):
    """The largest error of other_cell in three descriptions of the lattice."""
    return np.max([other_cell(calculator, atoms, seed, of) for seed in range(3)], 0)


HISTORY = "before and after another"
PROPERTIES = {  # name: (function, what it is measured in, tolerance)
    "rotation": (rotation, ALL, "rounding"),
    "reflection": (reflection, ALL, "rounding"),
    "translation": (translation, ALL, "rounding"),
    "permutation": (permutation, ALL, "rounding"),
    "another cell of the lattice": (three_other_cells, ALL, "rounding"),
    "supercell": (supercell, ALL, "rounding"),
    "atoms folded or not": (folding, ALL, "rounding"),
    "axis that does not repeat": (open_axis, ("energy", "forces"), "rounding"),
    HISTORY: (history, ALL, "self-consistent"),
    "alone or in a batch": (alone_or_in_a_batch, ALL, "rounding"),
    "slope of the energy": (slope, ("forces", "stress"), "slope"),
    "jump at the cutoff": (cutoff_continuity, ("energy", "forces"), "cutoff"),
    "isolated atom": (isolated_atom, ALL, "rounding"),
    "conservation, part of kinetic": (short_dynamics, ("energy",), "drift"),
    "strangers 30 Å apart": (strangers, ("energy", "forces"), "rounding"),
}
# Images see each other where atoms see far, and pairs cross a hard cutoff as the cell is strained
FAR = ("isolated atom", "strangers 30 Å apart", "slope of the energy")
FLOAT32 = {  # tolerance in float64: (in float32, what the function must know of it)
    "rounding": ("float32", {}),
    "self-consistent": ("self-consistent", {}),
    "slope": ("float32 slope", {"steps": (0.003, 0.01), "step_of_energy": 1e-3}),
    "cutoff": ("float32 cutoff", {"noise": 1e-5}),
    "drift": ("drift", {}),
}
QUIET = dict.fromkeys(ALL, 0.0)
SEEN = 3  # a control must be this many times the limit
NOISY = 10  # a limit must be this many times the noise


def measured(calculator, atoms: Atoms, parts) -> dict[str, float]:
    """The largest energy per atom, force, stress that a calculator gives of a crystal, by name.

    Raises Fault for what is no number, and for forces of another shape.
    """
    sizes = {}
    for of in dict.fromkeys((*parts, "forces")):
        if of == "stress" and atoms.cell.rank < 3:
            continue
        try:
            values = value(calculator, atoms, of)
        except (PropertyNotImplementedError, NotImplementedError):
            if facet_of(calculator):  # which has to do everything
                raise
            continue
        if of == "forces" and values.shape != (len(atoms), 3):
            raise Fault(f"forces of shape {values.shape}, not {(len(atoms), 3)}")
        if not np.isfinite(values).all():
            raise Fault(f"{of}: nan or infinite")
        sizes[of] = float(np.abs(values).max())
    return sizes


def property_row(name: str, calculator, atoms: Atoms, precision: str = "float64",
                 noise: dict = QUIET) -> Row:
    """One line of the table. noise: what the calculator's results are uncertain by, from `history`;
    it widens the limits."""
    function, parts, tolerance = PROPERTIES[name]
    more = {}
    if precision == "float32":
        tolerance, more = FLOAT32[tolerance]
    calculator = calculator if isinstance(calculator, Watched) else Watched(calculator)
    calculator.doing = name
    try:
        # How large is what is compared?
        sizes = measured(calculator, atoms, parts)
        asked = [of for of in parts if of in sizes]
        shown = tuple(sizes.get(of) if of in parts else None for of in ALL)
        if not asked:
            return Row(name, note="the calculator has none of it", told=NOT_ASKED)

        # What is allowed; forces set the scale
        model = facet_of(calculator)
        note = ""
        if model and model.config.activation == "silu" and name in ("rotation", "reflection"):
            tolerance = "silu"
        if model and tolerance == "self-consistent":  # it solves no equations
            tolerance = "rounding" if precision == "float64" else "float32"
        if name in FAR and not model:
            rounding = 1e-6 if precision == "float32" else 1e-11  # eV per atom
            if far_sight(calculator, atoms) > rounding + NOISY * noise["energy"]:
                tolerance = max(tolerance, "far", key=TOL.get)
                note = "atoms see each other beyond 27 Å"
        size = 1.0 if tolerance == "drift" else max(1.0, sizes.get("forces", 0.0))
        limit = TOL[tolerance] * size
        if tolerance not in ("self-consistent", "drift"):
            limit = max(limit, NOISY * max(noise.values()))
        if name in FAR:  # one atom may have the noise of all, and a slope divides it by its step
            step = more.get("steps", (2e-5, 1e-3))[1] if name.startswith("slope") else 1.0
            limit = max(limit, NOISY * noise["energy"] * len(atoms) / step)
        if name == "jump at the cutoff":
            more = {"noise": max(more.get("noise", 1e-9), NOISY * noise["energy"]), "small": limit}

        # Seven digits of energy make a stress, too: its limit is that of the virial per atom
        of_stress = None
        if tolerance == "float32 slope" and "stress" in asked:
            of_stress = limit * len(atoms) / abs(atoms.cell.volume)
            of_stress = max(of_stress, NOISY * noise["stress"])
            note = f"stress below {of_stress:.0e}" + (f"; {note}" if note else "")

        found = function(calculator, atoms, of=asked, **more)
        errors = dict(zip(asked, map(float, found), strict=True))
        row = Row(name, tuple(errors.get(of) for of in ALL), limit, note, shown,
                  stress_limit=of_stress)

        # Could it have failed?
        if tolerance in ("drift", "self-consistent"):
            tolerance = "float32" if precision == "float32" else "rounding"
        control = sizes.get("forces", max(sizes.values()))
        seen = control > SEEN * max(TOL[tolerance], *noise.values())
        return row if seen or row.wrong else row._replace(told=BLIND)
    except Fault as reason:
        return Row(name, note=str(reason), told=WRONG)
    except NothingToSee as reason:
        return Row(name, note=str(reason), told=BLIND)
    except NotApplicable as reason:
        return Row(name, note=str(reason), told=NOT_ASKED)
    except Exception as error:
        return Row(name, note=in_short(error), told=BROKE)


def noise_in(row: Row) -> dict[str, float]:
    """What the row HISTORY found of each quantity, if self-consistent fields may leave as much."""
    if row.verdict not in (OK, BLIND):
        return QUIET
    return {of: error or 0.0 for of, error in zip(ALL, row.errors, strict=True)}


GUARD = {"cutoff": 5.0, "channels": 32, "groups": 8, "splines": 24, "mean_neighbours": 30.0,
         "energy_scale": 0.03, "core": (1.0, 0.9, 0.8)}  # Facet's default sizes
WIDE_CORE = (1.3, 1.2, 1.1)  # Å; the crystals below have atoms within each other's core


def guard_calculator(device: str = "cpu") -> facet.FacetCalculator:
    return facet.FacetCalculator(build(**GUARD), device, torch.float64)


def sizes_of(model, *crystals: Atoms) -> tuple:
    """The largest energy (eV), force (eV/Å) and virial (eV) of some crystals."""
    out = outputs(model, *crystals)
    return tuple(float(np.abs(out[name]).max()) for name in ("energy", "forces", "virial"))


def ladder_row(device: str) -> Row:
    name = "equals reference_numpy.py"
    model = copy.deepcopy(build(**{**GUARD, "core": WIDE_CORE})).to(device)
    try:
        steps = ladder(model, SMALL)
    except (AssertionError, KeyError, ValueError) as error:
        note = f"that file has another network; change it, too ({in_short(error)})"
        return Row(name, note=note, told=BROKE)
    broken = [stage for stage, error in steps.items() if not error <= TOL["rounding"]]
    note = f"breaks at {broken[0]}" if broken else f"{len(steps)} stages"
    errors = (float(np.max([*steps.values()])), None, None)  # nan stays nan
    return Row(name, errors, TOL["rounding"], note, sizes_of(model, SMALL))


def weight_row(activation: str, device: str) -> Row:
    model = copy.deepcopy(build(activation=activation, core=WIDE_CORE)).to(device)
    batch = batch_of(model, TRICLINIC, SMALL)
    errors = tuple(weight_slope(model, batch, of) for of in ("energy", "forces", "virial"))
    return Row(f"gradients for weights, {activation}", errors, TOL["slope"],
               sizes=sizes_of(model, TRICLINIC, SMALL))


def empty_row(device: str) -> Row:
    model = copy.deepcopy(build(**GUARD)).to(device)
    error = empty_places(model, TRICLINIC)
    return Row("empty places", (None, error, None), TOL["rounding"],
               sizes=sizes_of(model, TRICLINIC))


def float32_row(device: str) -> Row:
    """float32 against float64, of a model whose splines have a first knot among the distances."""
    changes = {**GUARD, "core": WIDE_CORE, "first_knot": 1.4}
    single, double = [
        outputs(copy.deepcopy(build(dtype, **changes)).to(device), TRICLINIC, SMALL)
        for dtype in (torch.float32, torch.float64)]
    errors = tuple(
        largest(single[name], double[name])[0] for name in ("energy", "forces", "virial"))
    sizes = sizes_of(build(**changes), TRICLINIC, SMALL)
    return Row("float32 against float64", errors, TOL["float32"], sizes=sizes)


def third_derivative_errors(model, batch, seed: int = 0, step: float = 1e-6) -> dict[str, tuple]:
    """Third derivatives of the energy by autograd, against differences of second ones: error,
    relative to the size, and size.

    "places": by displacements c and d of the atoms and by each r_ij; "weights": by c, d and each
    weight, which is what training on Hessians needs. Raises ValueError for an energy of nan.
    """
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randn(2, len(batch.species), 3, dtype=torch.float64, generator=generator)
    moves = moves.to(batch.vectors)  # [2, N, 3]
    c, d = moves[:, batch.src] - moves[:, :, None]  # [2, N, K, 3], of x_j − x_i
    weights = list(model.parameters())

    def slopes(vectors, along) -> tuple:
        """Of the energy's derivative along some moves: by r_ij [N, K, 3], by weights."""
        vectors = vectors.detach().requires_grad_()
        total = model.atomic_outputs(batch._replace(vectors=vectors))["energies"].sum()
        if not total.isfinite():
            raise ValueError("the energy is no number")
        for move in along:
            gradient, = torch.autograd.grad(total, vectors, create_graph=True)
            total = (gradient * move).sum()
        by_place, *by_weight = torch.autograd.grad(total, [vectors, *weights], allow_unused=True)
        by_weight = [as_numpy(g).ravel() for g in by_weight if g is not None]
        return as_numpy(by_place), np.concatenate(by_weight)

    got = slopes(batch.vectors, (c, d))
    ahead, behind = [slopes(batch.vectors + sign * step * d, (c,)) for sign in (1, -1)]
    errors = {}
    for n, name in enumerate(("places", "weights")):
        want = (ahead[n] - behind[n]) / (2 * step)
        errors[name] = largest(got[n], want)[0], float(np.abs(want).max())
    return errors


def third_row(device: str) -> Row:
    """The cores end at no distance of the crystal, where a third derivative jumps."""
    model = copy.deepcopy(build(core=(1.32, 1.21, 1.12))).to(device)
    errors = third_derivative_errors(model, batch_of(model, TRICLINIC, SMALL))
    worst, sizes = zip(*errors.values(), strict=True)
    return Row("third derivatives", (None, max(worst), None), TOL["slope"], sizes=(
        None, min(sizes), None))


PARTS = {  # rows about Facet's own parts, functions of the device
    "equals reference_numpy.py": ladder_row,
    "gradients for weights, product": partial(weight_row, "product"),
    "gradients for weights, silu": partial(weight_row, "silu"),
    "empty places": empty_row,
    "third derivatives": third_row,
    "float32 against float64": float32_row,
}


def guard_row(name: str, device: str = "cpu") -> Row:
    """One row of `python -m tools.check`; an exception is an error, too."""
    try:
        if name in PROPERTIES:
            return property_row(name, guard_calculator(device), TRICLINIC)
        return PARTS[name](device)
    except Exception as error:
        return Row(name, note=in_short(error), told=BROKE)


def guard() -> list[Row]:
    """The wrong rows of `python -m tools.check`: none if all is right."""
    rows = [guard_row(name) for name in (*PROPERTIES, *PARTS)]
    return [row for row in rows if row.wrong]


# ─── The table and the command line ──────────────────────────────────────────────────────────────


HEADER = f"{'property':33}{'energy/size':16}{'forces/size':16}{'stress/size':16}should be"


def line(row: Row) -> str:
    """A row as text."""
    cells = []
    for error, size in zip(row.errors, row.sizes, strict=True):
        text = "-" if error is None else f"{error:.1e}"
        if error is not None and size is not None:
            text += f"/{size:.2g}"
        cells.append(f"{text:16}")
    limit = f"below {row.limit:.0e}" if row.limit > 0 else ""
    return f"{row.name:33}{''.join(cells)}{limit:12} {row.verdict:5}  {row.note}".rstrip()


def table(title: str, rows) -> list[str]:
    """Print rows as they come; returns their verdicts."""
    print(title)
    print(HEADER)
    verdicts = []
    for row in rows:
        print(line(row), flush=True)
        verdicts.append(row.verdict)
    return verdicts


def sentence(verdicts: list[str]) -> tuple[str, int]:
    """The last line, and the exit code: 0 if every row that was asked is right, and most were."""
    count = {verdict: verdicts.count(verdict) for verdict in (WRONG, BROKE, BLIND, NOT_ASKED)}
    words = [f"{count[WRONG]} wrong"] if count[WRONG] else []
    words += [f"{count[BROKE]} broke"] if count[BROKE] else []
    words += [f"{count[BLIND]} with nothing to see"] if count[BLIND] else []
    if not words and 2 * count[NOT_ASKED] > len(verdicts):
        words = [f"{count[NOT_ASKED]} of {len(verdicts)} not asked: this says little"]
    return (", ".join(words), 1) if words else ("all is right", 0)


def chosen(rows: str, names) -> list[str]:
    """The names that begin with one of `rows`, which commas separate; all if it is empty.

    Raises CannotBegin for what begins none.
    """
    names = [*names]
    prefixes = [prefix.strip() for prefix in rows.split(",") if prefix.strip()]
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            raise CannotBegin(f"no row begins with {prefix!r}; there are: {'; '.join(names)}")
    return [name for name in names if not prefixes or name.startswith(tuple(prefixes))]


def check_facet(device: str, rows: str = "") -> int:
    """`python -m tools.check`: the table for a Facet with random weights, and what it costs.

    Returns the exit code. With a choice of rows there is nothing but these.
    """
    names = chosen(rows, (*PROPERTIES, *PARTS))
    cuda = device.startswith("cuda")
    where = torch.cuda.get_device_name(device) if cuda else device.upper()
    print(f"Facet on {where}, threads: {torch.get_num_threads()}, torch {torch.__version__}")
    verdicts = table("float64, random weights, errors in eV per atom, eV/Å, eV/Å³",
                     (guard_row(name, device) for name in names))
    text, code = sentence(verdicts)
    print(text)
    if rows:
        return code

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
    return code


def check_calculator(words: list[str], dtype: str, device: str, files: list[str],
                     species: list[str], rows: str, every: bool) -> int:
    """`python -m tools.check --calculator …`: a table for each crystal. Returns the exit code."""
    names = chosen(rows, PROPERTIES)
    verdicts = []
    for title, calculator, precision in given_calculators(words, dtype, device):
        model = facet_of(calculator)
        known = species or (list(model.config.species) if model else [])
        for atoms, how in structures(calculator, files, known, every):
            # History first, and once: what a calculator remembers it may never forget
            remembered = property_row(HISTORY, calculator, atoms, precision)
            noise = noise_in(remembered)

            # Made one by one, as they are printed
            made = (remembered if name == HISTORY else
                    property_row(name, calculator, atoms, precision, noise) for name in names)
            verdicts += table(
                f"{title}, {atoms.symbols} ({how}); errors in eV per atom, eV/Å, eV/Å³", made)
            if max(noise.values()) > TOL["rounding"]:
                print(f"noise {max(noise.values()):.0e}: limits are at least ten times that")
            print()
        print(f"{calculator.calls} calls, {monotonic() - calculator.start:.1f} s")
    text, code = sentence(verdicts)
    print(text)
    return code


EXAMPLES = """examples:
    %(prog)s                                        is facet.py right?
    %(prog)s --device cuda                          is it on a GPU?
    %(prog)s --calculator runs/si/model.pt          a trained model
    %(prog)s --calculator ase.calculators.emt:EMT   any calculator, module:callable
    %(prog)s --calculator tblite.ase:TBLite method=GFN2-xTB verbosity=0 --atoms crystal.cif
    %(prog)s --calculator dftd3.ase:DFTD3 method=PBE damping=d3bj --dtype float64
    %(prog)s --calculator sevenn.calculator:SevenNetCalculator model=7net-0 device=cpu
    %(prog)s --calculator chgnet.model:CHGNetCalculator.from_file path=weights.pt
    %(prog)s --calculator my.py:potential cutoff=5 types="{'Si': 1}"   a function of your own

exit code: 0 all is right; 1 a row is wrong, broke or had nothing to see; 2 it could not begin
"""


def main(program: str = "python -m tools.check") -> int:
    """The command line of `program`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Print the properties of Facet, or of any ASE calculator, with their errors "
        "and the size of what is compared.")
    parser.add_argument("--calculator", nargs="+", metavar="SPEC", help="a .pt file, or "
                        "module:callable, module:Class.method, path/to/file.py:function; then "
                        "key=value for its keyword arguments, Python literals or text")
    parser.add_argument("--atoms", nargs="+", default=[], metavar="FILE", help="files with crystals"
                        "; of those at rest the atoms are rattled; default: what suits")
    parser.add_argument("--species", nargs="+", default=[], help="elements of built-in crystals")
    parser.add_argument("--dtype", default="", choices=["float32", "float64"],
                        help="precision to judge by; default: both for a .pt file, else float32")
    parser.add_argument("--rows", default="", metavar="NAMES",
                        help="these rows only: beginnings of their names, between commas")
    parser.add_argument("--all", action="store_true",
                        help="crystals and molecules of every kind that the calculator takes")
    parser.add_argument("--device", default="", help="where a Facet runs; default: cpu, a trained "
                        "model on cuda if there is one")
    arguments = parser.parse_args()
    check_device(parser, arguments.device or "cpu")

    try:
        if not arguments.calculator:
            if arguments.atoms or arguments.species or arguments.all:
                raise CannotBegin("--atoms, --species and --all go with --calculator")
            return check_facet(arguments.device or "cpu", arguments.rows)
        if arguments.device and not arguments.calculator[0].endswith(".pt"):
            raise CannotBegin("--device is for Facet; other calculators take theirs as key=value")
        return check_calculator(arguments.calculator, arguments.dtype, arguments.device,
                                arguments.atoms, arguments.species, arguments.rows, arguments.all)
    except CannotBegin as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
