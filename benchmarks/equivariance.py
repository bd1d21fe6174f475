"""What a grid costs and what exactness buys: product and SiLU as grid layer, trained or not.

    python benchmarks/equivariance.py --data FOLDER          # about an hour on one quiet core
    python benchmarks/equivariance.py --data FOLDER --quick  # a minute: hardly trained; not kept
    python benchmarks/equivariance.py --draw                 # the picture again, from the results

FOLDER holds mlearn/Si_{train,test}.extxyz. Trains a model of each kind on silicon with
train_small.py's defaults, then

    1  turns rattled crystals by random rotations, half of them improper, in float64: by how much
       the forces, turned back, differ from rotation to rotation, on grids from 14 to 302 points,
       with weights as they start and as trained; the same during training; and by how much one
       grid layer alone does, its input made larger or smaller;
    2  times an evaluation (energy, forces, stress of 64 atoms in float32, neighbours given) on each
       grid, all in turn;
    3  lets a silicon crystal move without thermostat: drift and fluctuation of the total energy;
    4  lets an isolated cluster move that does not rotate at first: angular momentum, which should
       stay 0. Its bonds are tethered (see cold_cluster).

Trained models are kept in --out; delete that folder after a change of facet.py or train_small.py
that no setting shows. Writes benchmarks/results/equivariance.json and its picture.
"""
from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ase.build
import numpy as np
import torch
from ase import units
from ase.constraints import Hookean
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import Stationary, ZeroRotation
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE
from common import (
    FIGURES,
    WORK,
    columns,
    command_line,
    hardware,
    in_turn,
    read_set,
    rounded,
    silicon,
    write_results,
)
from pictures import draw_results
from scipy.spatial.transform import Rotation

import facet
import train_small
from tools import evaluate
from tools.properties import wigner

# activation, grid_degree (0: its default)
MODELS = {"product": ("product", 0), "silu": ("silu", 0), "silu-26": ("silu", 7)}

# points: the degree that they integrate exactly
GRIDS = {
    14: 5, 26: 7, 38: 9, 50: 11, 74: 13, 86: 15, 110: 17, 146: 19, 170: 21, 194: 23, 302: 29}
AMPLITUDES = (0.125, 0.25, 0.5, 1, 2, 4, 8)
LATTICE = 5.469  # Å, silicon in PBE, which the training set was made with


# ─── Models ──────────────────────────────────────────────────────────────────────────────────────


class Snapshots(train_small.Log):
    """Keeps the (averaged) weights of every line of the log."""

    def line(self, model: facet.Facet, left: float, row: dict) -> None:
        super().line(model, left, row)
        facet.save(model, self.path.parent / f"{row['step']}.pt")


def trained(name: str, data: Path, out: Path, steps: int) -> tuple[dict[int, facet.Facet], dict]:
    """The model after 0, 1/20, …, all of the steps, in float64; test errors and seconds.

    Trains unless `out` has it.
    """
    activation, grid_degree = MODELS[name]
    folder = out / f"{name}-{steps}"
    result = folder / "result.json"
    train, tests = read_set(data, "Si")
    test = tests["Si"]
    settings = train_small.Settings(steps=steps, activation=activation)
    config, _ = train_small.statistics(train, settings)
    config = replace(config, grid_degree=grid_degree)

    if not result.exists() or facet.load(folder / "0.pt").config != config:
        print(f"training {name}, {steps} steps → {folder}/")
        folder.mkdir(parents=True, exist_ok=True)
        result.unlink(missing_ok=True)
        torch.manual_seed(settings.seed)
        model = facet.Facet(config)
        facet.save(model, folder / "0.pt")
        nothing = train[:0]  # there is nothing to choose, so nothing to validate
        model, spent = train_small.train(model, train, nothing, settings, folder)
        errors = evaluate.errors(evaluate.predict(model, test), test)
        result.write_text(json.dumps({**spent, **errors}))

    models = {}
    for step in sorted(int(path.stem) for path in folder.glob("*.pt") if path.stem.isdigit()):
        model = facet.load(folder / f"{step}.pt", dtype=torch.float64)
        models[step] = model.requires_grad_(False)
    return models, json.loads(result.read_text())


def on_grid(model: facet.Facet, exact_degree: int, dtype=torch.float64) -> facet.Facet:
    """The same weights on another grid."""
    config = replace(model.config, grid_degree=exact_degree)
    other = facet.Facet(config, dtype).requires_grad_(False)
    other.load_state_dict(model.state_dict())
    return other


def points(model: facet.Facet) -> int:
    return len(model.layers[0].grid.to_grid)


# ─── 1 Error under rotation ──────────────────────────────────────────────────────────────────────


def rotations(count: int) -> np.ndarray:
    """Uniformly distributed, every second one improper: [count, 3, 3]."""
    return Rotation.random(count, 0).as_matrix() * (-1.0) ** np.arange(count)[:, None, None]


def model_error(model: facet.Facet, crystals: list[ase.Atoms], turns: np.ndarray) -> float:
    """How the forces, turned back, differ from rotation to rotation, over their size.

    Standard deviation over rotations; root mean square over crystals and atoms.
    """
    spread = []  # variances
    size = []  # mean squares
    for atoms in crystals:
        graph = facet.find_neighbours(atoms, model.config)
        turned = [graph._replace(vectors=graph.vectors @ R.T) for R in turns]
        out = model(facet.make_batch(turned, model.config.cutoff, torch.float64))
        forces = out["forces"].numpy().reshape(len(turns), -1, 3) @ turns  # [rotations, N, 3]
        spread.append(forces.var(0).mean())
        size.append((forces.mean(0) ** 2).mean())
    return (np.mean(spread) / np.mean(size)) ** 0.5


def layer_input(model: facet.Facet, atoms: ase.Atoms) -> torch.Tensor:
    """What the last grid layer that has an l > 0 is given for this crystal: [N, M, C]."""
    kept = []

    def keep(grid, inputs):
        kept.append(inputs[0][: len(atoms)].detach())

    hook = model.layers[-2].grid.register_forward_pre_hook(keep)
    graph = facet.find_neighbours(atoms, model.config)
    model(facet.make_batch([graph], model.config.cutoff, torch.float64))
    hook.remove()
    return kept[0]


def layer_error(model: facet.Facet, x: torch.Tensor, turns: np.ndarray) -> float:
    """Of the f in x → x + f(x) of that grid layer alone, over f; root mean square over turns."""
    grid = model.layers[-2].grid
    f = grid(x) - x  # [N, M, C]
    squares = []
    for R in turns:
        D = wigner(R, model.config.degree)  # [M, M]
        turned = D @ x
        error = D @ f - (grid(turned) - turned)
        squares.append(float(error.norm() / f.norm()) ** 2)
    return float(np.mean(squares) ** 0.5)


def against_amplitude(model: facet.Facet, crystal: ase.Atoms, turns: np.ndarray) -> list[dict]:
    """That layer, its input multiplied by the amplitudes: its root mean square, relative error."""
    x = layer_input(model, crystal)
    rows = []
    for amplitude in AMPLITUDES:
        rms = float(amplitude * x.square().mean().sqrt())
        error = layer_error(model, amplitude * x, turns)
        rows.append({"amplitude": amplitude, "input_rms": rms, "relative": error})
    return rows


def rotation_errors(name: str, models: dict[int, facet.Facet], grids: list[int], turns) -> dict:
    """All of part 1 for one kind of model."""
    print(f"  {name}: standard deviation over {len(turns)} rotations, relative")
    crystals = [ase.build.bulk("Si", a=LATTICE, cubic=True) for _ in range(4)]  # 8 atoms each
    for seed, crystal in enumerate(crystals):
        crystal.rattle(0.1, seed=seed)  # Å, about as far as atoms move at 600 K

    result = {}
    last = models[max(models)]
    for when, model in (("before", models[0]), ("after", last)):
        errors = []
        for number in grids:
            errors.append(model_error(on_grid(model, GRIDS[number]), crystals, turns))
        result[when] = {"points": grids, "force_relative": errors}
        words = [f"{number}: {error:.1e}" for number, error in zip(grids, errors, strict=True)]
        print(f"  {name}, {when} training, points: error of the forces: {', '.join(words)}")
        rows = against_amplitude(model, crystals[0], turns)
        result[f"amplitude_{when}"] = columns(rows)
        words = [f"{row['input_rms']:.2g}: {row['relative']:.1e}" for row in rows]
        print(f"    layer alone, rms of its input: relative error: {', '.join(words)}")

    errors = [model_error(model, crystals, turns) for model in models.values()]
    result["during"] = {"step": list(models), "force_relative": errors}
    words = [f"{step}: {error:.1e}" for step, error in zip(models, errors, strict=True)]
    print(f"  {name} on {points(last)} points, step: error of the forces: {', '.join(words)}")
    return result


# ─── 2 Time ──────────────────────────────────────────────────────────────────────────────────────


def times(models: dict[str, facet.Facet], grids: list[int], seconds: float) -> dict:
    """Milliseconds of each activation on each grid."""
    graph = facet.find_neighbours(silicon(2), models["product"].config)
    batch = facet.make_batch([graph], 5.0)
    jobs = {}
    for name in ("product", "silu"):
        for number in grids:
            model = on_grid(models[name], GRIDS[number], torch.float32)
            jobs[name, number] = lambda model=model: model(batch)
    ms = in_turn(jobs, seconds)

    table = {}
    for name in ("product", "silu"):
        table[name] = {"points": grids, "ms": [ms[name, number] for number in grids]}
        words = [f"{number}: {ms[name, number]:.1f}" for number in grids]
        print(f"    {name:8s} {', '.join(words)}")
    return table


# ─── 3 and 4 Motion ──────────────────────────────────────────────────────────────────────────────


def move(model: facet.Facet, start: ase.Atoms, dtype: str, ps: float, observe: Callable) -> tuple:
    """Velocity Verlet with steps of 1 fs: times [n] ps, and observe(atoms), [n, …]; every 10 fs."""
    atoms = start.copy()
    atoms.calc = facet.FacetCalculator(model, "cpu", getattr(torch, dtype))
    rows = []
    dynamics = VelocityVerlet(atoms, units.fs)
    dynamics.attach(lambda: rows.append(observe(atoms)), interval=10)
    dynamics.run(round(1000 * ps))
    return 0.01 * np.arange(len(rows)), np.array(rows)


def warm(atoms: ase.Atoms, kelvin: float, rng: np.random.Generator) -> None:
    """Momenta of twice the temperature: half becomes potential energy."""
    spread = np.sqrt(2 * units.kB * kelvin * atoms.get_masses())[:, None]
    atoms.set_momenta(rng.normal(size=(len(atoms), 3)) * spread)


def warm_crystal(model: facet.Facet, n: int, kelvin: float, ps: float) -> ase.Atoms:
    """8 n³ atoms in equilibrium."""
    atoms = ase.build.bulk("Si", a=LATTICE, cubic=True) * (n, n, n)
    atoms.calc = facet.FacetCalculator(model, "cpu")
    rng = np.random.default_rng(0)
    warm(atoms, kelvin, rng)
    dynamics = Langevin(
        atoms, units.fs, temperature_K=kelvin, friction=0.01 / units.fs, rng=rng, fixcm=False)
    dynamics.run(round(1000 * ps))
    Stationary(atoms)
    return atoms


def conservation(name: str, model: facet.Facet, start: ase.Atoms, dtype: str, ps: float) -> dict:
    """Drift of the total energy: slope of a line through it; and fluctuation about that line."""
    t, rows = move(
        model, start, dtype, ps, lambda atoms: (atoms.get_total_energy(), atoms.get_temperature()))
    energy = 1000 * (rows[:, 0] - rows[:, 0].mean()) / len(start)  # meV/atom
    kelvin = rows[:, 1].mean()
    slope, offset = np.polyfit(t, energy, 1)
    fluctuation = (energy - slope * t - offset).std()
    print(
        f"    {name:8s} {dtype}, {ps:g} ps, {kelvin:.0f} K   drift {slope:+.1e} meV/atom/ps   "
        f"fluctuation {fluctuation:.1e} meV/atom")
    return {
        "drift_meV_per_atom_per_ps": slope, "fluctuation_meV_per_atom": fluctuation,
        "mean_K": kelvin, "ps": ps, "atoms": len(start),
        "trace_ps": t[::10], "trace_meV_per_atom": energy[::10]}


def cold_cluster(model: facet.Facet, kelvin: float) -> ase.Atoms:
    """The cage of ten atoms around an empty site of the crystal; it vibrates, but does not rotate.

    Springs pull bonds longer than 2.6 Å back. Without them the cluster flies apart: the training
    set knows bulk only, so that E0, the energy of an isolated atom, is that of an atom of the
    crystal. A spring between two atoms adds no torque.
    """
    crystal = ase.build.bulk("Si", a=LATTICE, cubic=True) * (3, 3, 3)
    # four atoms at 2.4 Å from the site, six at 2.7, no other below 4; axes off those of the grid
    from_site = np.linalg.norm(crystal.positions - 1.5 * LATTICE, axis=1)
    atoms = ase.Atoms("Si10", crystal.positions[from_site < 3.2] @ rotations(1)[0].T)

    bonds = np.argwhere(np.triu(atoms.get_all_distances() < 2.5, 1)).tolist()
    springs = [Hookean(a, b, k=20.0, rt=2.6) for a, b in bonds]  # eV/Å², Å
    atoms.set_constraint(springs)
    atoms.calc = facet.FacetCalculator(model, "cpu", torch.float64)
    FIRE(atoms, logfile=None).run(fmax=0.01, steps=1000)
    warm(atoms, kelvin, np.random.default_rng(0))
    Stationary(atoms)
    ZeroRotation(atoms)
    return atoms


def spin(name: str, model: facet.Facet, start: ase.Atoms, dtype: str, ps: float,
         kelvin: float) -> dict:
    """Angular momentum over √(kT tr I), that of a rotating cluster."""

    def observe(atoms):
        r = atoms.positions - atoms.get_center_of_mass()  # [N, 3] Å
        apart = (atoms.get_all_distances() + 1e3 * np.eye(len(atoms))).min(1).max()  # Å
        trace = 2 * (atoms.get_masses()[:, None] * r**2).sum()  # of the tensor of inertia
        momentum = np.linalg.norm(np.cross(r, atoms.get_momenta()).sum(0))
        return momentum / np.sqrt(units.kB * kelvin * trace), apart

    t, rows = move(model, start, dtype, ps, observe)
    momentum, apart = rows.T
    print(
        f"    {name:8s} {dtype}, {ps:g} ps   angular momentum at most {momentum.max():7.1e}   "
        f"nearest neighbour within {apart.max():.2f} Å")
    return {
        "angular_momentum_largest": momentum.max(), "farthest_neighbour_A": apart.max(), "ps": ps,
        "atoms": len(start), "trace_ps": t[::5], "trace_angular_momentum": momentum[::5]}


# ─── All of it ───────────────────────────────────────────────────────────────────────────────────


def measure(args: argparse.Namespace) -> dict:
    """Everything, as it goes into the results file."""
    grids = [14, 26, 86] if args.quick else list(GRIDS)
    turns = rotations(4 if args.quick else 24)
    results = {
        "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "rotations": len(turns),
        "models": {}, "rotation": {}}
    models = {}
    for name in MODELS:
        models[name], results["models"][name] = trained(name, args.data, args.out, args.steps)
    last = {name: steps[max(steps)] for name, steps in models.items()}

    print("models: test errors")
    for name, one in results["models"].items():
        one["points"] = points(last[name])
        print(
            f"    {name:8s} {one['points']:3d} points, {one['steps']} steps in "
            f"{one['train_seconds']:.0f} s   energy MAE {one['energy_mae_meV_per_atom']:.2f} "
            f"meV/atom, force MAE {1000 * one['force_mae_eV_per_A']:.1f} meV/Å")

    print("1 error under rotation")
    for name, steps in models.items():
        results["rotation"][name] = rotation_errors(name, steps, grids, turns)
    print(f"2 milliseconds of an evaluation, {results['threads']} threads")
    results["time"] = times(last, grids, 1 if args.quick else 60)

    results.update(crystal_K=args.kelvin, crystal={}, cluster_K=args.cluster_kelvin, cluster={})
    print(f"3 total energy of a crystal at about {args.kelvin:g} K")
    for name, model in last.items():
        start = warm_crystal(model, args.cells, args.kelvin, min(2, args.ps))
        found = conservation(name, model, start, "float32", args.ps)
        results["crystal"][f"{name} float32"] = found
    print(f"4 a cluster at about {args.cluster_kelvin:g} K")
    for name, model in last.items():
        start = cold_cluster(model, args.cluster_kelvin)
        for dtype in ("float32", "float64"):
            found = spin(name, model, start, dtype, args.cluster_ps, args.cluster_kelvin)
            results["cluster"][f"{name} {dtype}"] = found
    return results


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, help="folder of the data")
    parser.add_argument("--out", type=Path, default=WORK / "equivariance",
                        help="where trained models are kept")
    parser.add_argument("--steps", type=int, default=600, help="of each training")
    parser.add_argument("--ps", type=float, default=20,
                        help="motion of the crystal")
    parser.add_argument("--cells", type=int, default=2,
                        help="the crystal has 8 times the cube of this atoms")
    parser.add_argument("--kelvin", type=float, default=600)
    parser.add_argument("--cluster_ps", type=float, default=5)
    parser.add_argument("--cluster_kelvin", type=float, default=150)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--draw", action="store_true", help="draw the results that are there")
    args = parser.parse_args()
    start = time.perf_counter()
    if args.draw:
        return draw_results("equivariance")
    if not args.data:
        parser.error("--data FOLDER is needed")
    if args.quick:
        args.steps, args.ps, args.cells, args.cluster_ps = 8, 0.2, 1, 0.2

    torch.set_num_threads(args.threads)
    train_small.Log = Snapshots  # `train` makes its log itself
    print(
        f"{hardware()}, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, "
        f"{args.threads} threads")
    results = measure(args)
    results["seconds"] = time.perf_counter() - start
    print(f"{results['seconds']:.0f} s")
    if args.quick:
        draw_results("equivariance", args.out, rounded(results))
    else:
        write_results("equivariance", results)
        draw_results("equivariance", FIGURES)


if __name__ == "__main__":
    main()
