"""Which parts of Facet earn their place? Swap one at a time for what others use; compare accuracy, time and memory.

    python benchmarks/ablations.py --data FOLDER --timings          # first, on a quiet machine: minutes; nothing is trained
    python benchmarks/ablations.py --data FOLDER --parallel 2       # then train: prints the plan, then hours; resumes if stopped
    python benchmarks/ablations.py --data FOLDER --draw             # only print and draw what there is

    radial   splines against MLPs (shared like ours, or edge-wise as in MACE and NequIP), Bessel-linear, fixed splines, B
    update   the exact product grid against the paper's SiLU grid, gate, linear only, tensor product
    density  sum over neighbours first against edge by edge: the same numbers, so only time and memory are measured
    size     degree L, channels C, layers T

Every variant is the default model with one part replaced by a small subclass of facet.py's, or one number of its Config
changed; everything else, learning rates included, stays as train_small.py has it. Test errors are given after equal steps
(--steps) and after equal time: as many steps as take the time that the default needs for --steps, by the measured times of
a step. (Where these differ by less than 5 %, one training serves for both.) So the schedule is always complete, and a busy
machine changes little. Times are milliseconds of one core, the processor's own count. All in float32. FOLDER is as in
accuracy.py. Each run is saved when it ends, to benchmarks/results/ablations.json; delete that file to begin anew. In the
end come the table, the answers and figures/ablations.png.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from math import sqrt
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from common import SETS, each_layer, in_turn, read_results, silicon, write_results
from density import EdgeWiseDensity

import facet
import train_small
from pictures import draw_results

ENERGY, FORCE = "energy_mae_meV_per_atom", "force_mae_eV_per_A"
EQUAL = 0.05  # steps that differ by less take equal time


# ─── Radial functions ────────────────────────────────────────────────────────────────────────────────────────────────

class BesselLinear(facet.RadialSplines):
    """φ(r) = Σ_n W[n, φ] β_n(r) with the B sine-Bessel functions β_n as basis, in place of splines. Starts as the splines do."""

    def __init__(self, count: int, config: facet.Config):
        super().__init__(count, replace(config, splines=config.groups))

    def basis(self, r: Tensor) -> Tensor:
        """r [...] Å → [..., B]."""
        x, n = (r[..., None] / self.cutoff).clamp(max=1), torch.arange(1, len(self.coefficients) + 1, device=r.device)
        return sqrt(2 / 3) * torch.pi * n * torch.sinc(n * x) * (1 - 28 * x ** 6 + 48 * x ** 7 - 21 * x ** 8)


class MLP(nn.Module):
    """y = W₃ s(W₂ s(W₁ x)), two hidden layers of 64, s = silu/0.6 of unit variance. No biases: 0 → 0 at the cutoff."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__()
        widths = (fan_in, 64, 64, fan_out)
        self.W = nn.ParameterList(facet.randn(a, b, fan_in=a) for a, b in zip(widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        """[..., fan_in] → [..., fan_out]."""
        *hidden, last = self.W
        for W in hidden:
            x = silu(x @ W) / 0.6  # [..., 64]
        return x @ last  # [..., fan_out]


class RadialMLP(BesselLinear):
    """φ(r) = MLP_t(β(r)): one MLP per layer t gives the functions that our splines give, B for each harmonic degree."""

    def __init__(self, count: int, config: facet.Config):
        super().__init__(count, config)
        self.coefficients.requires_grad_(False)  # only their number counts here
        self.mlps = nn.ModuleList(MLP(config.groups, count // config.layers) for _ in range(config.layers))

    def forward(self, r: Tensor) -> Tensor:
        """r [N, K] Å → [N, K, count]. Only what lies within the cutoff goes through the MLPs: padding can be most of K."""
        inside = r < self.cutoff  # [N, K]
        beta = self.basis(r[inside])  # [E, B]
        phi = torch.cat([mlp(beta) for mlp in self.mlps], -1)  # [E, count]
        return phi.new_zeros(*r.shape, phi.shape[1]).index_put((inside,), phi)  # [N, K, count]


class EdgeList(EdgeWiseDensity):
    """The density edge by edge as most codes do it, with a list of edges and a scatter sum:

        A[i,p,m3,c] = Σ_j R_pc(r_ij) Σ_m1 T[ij,p,m3,m1] h[j,l1m1,c],     R_pc = φ_b,l2 as in facet.Density

    Unlike in its parent nothing is padded: in a batch of different crystals more than half of the places can be padding.
    """

    def __init__(self, l_in: int, l_out: int, config: facet.Config):
        super().__init__(l_in, l_out, config)
        self.widths = [[2 * l3 + 1 for a, _, l3 in self.paths if a == l1] for l1 in range(l_in + 1)]  # rows of each path

    def radial(self, phi: Tensor, C: int) -> list[Tensor]:
        """φ [E, B, L+1] → R of each path, [E, 1, C]."""
        phi = phi.repeat_interleave(C // phi.shape[1], 1)[:, None]  # [E, 1, C, L+1]
        return [phi[..., l2] for _, l2, _ in self.paths]  # [E, 1, C] for each path

    def forward(self, h: Tensor, index: Tensor, phi: Tensor, Y: Tensor) -> list[Tensor]:
        """As facet.Density."""
        (N, _, C), (_, B, _, K) = h.shape, phi.shape
        dst, slot = phi.detach()[:, :, 0].any(1).nonzero(as_tuple=True)  # [E], [E] what lies within the cutoff
        src = index.view(N, B, K)[dst, 0, slot] // B  # [E]
        radial = self.radial(phi.permute(0, 3, 1, 2)[dst, slot], C)  # [E, 1, C] for each path
        Y, sums, p = self.scale * Y.mT[dst, slot], [], 0  # [E, m2]
        for l1, widths in enumerate(self.widths):
            h_src = h[:, facet.degree(l1)].index_select(0, src)  # [E, m1, C]
            T = (Y @ getattr(self, f"G{l1}")).view(len(dst), -1, 2 * l1 + 1)  # [E, rows, m1]
            messages = torch.bmm(T, h_src) if l1 else T * h_src  # [E, rows, C]
            for message in messages.split(widths, 1):
                sums.append(h.new_zeros(N, message.shape[1], C).index_add(0, dst, message * radial[p]))  # [N, m3, C]
                p += 1
        A = torch.cat(sums, 1).index_select(1, self.back).split([(2 * l + 1) * Q for l, Q in enumerate(self.counts)], 1)
        return [a.reshape(-1, Q * C) for a, Q in zip(A, self.counts)]


class EdgeWiseMLP(EdgeList):
    """As MACE and NequIP: every path and channel has a radial function of its own, R(r) = MLP(β(r)). Wants φ_b,l = β_b."""

    def __init__(self, l_in: int, l_out: int, config: facet.Config):
        super().__init__(l_in, l_out, config)
        self.mlp = MLP(config.groups, len(self.paths) * config.channels)

    def radial(self, phi: Tensor, C: int) -> list[Tensor]:
        """φ [E, B, L+1] → R of each path, [E, 1, C]."""
        return self.mlp(phi[..., 0]).view(len(phi), 1, -1, C).unbind(2)  # [E, 1, C] for each path


# ─── Node update ─────────────────────────────────────────────────────────────────────────────────────────────────────

class LinearOnly(nn.Module):
    """x → x + W₃ x: no non-linearity but the product of features and geometry in the density."""

    def __init__(self, L: int, config: facet.Config):
        super().__init__()
        self.W3 = facet.Linear(L, config.channels, config.channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, M, C] → [N, M, C]."""
        return x + self.W3(x)


class Gate(LinearOnly):
    """x → x + W₃ f, as in NequIP: f_0 = silu(s_0), f_l = σ(s_l) ⊙ (W₁ x)_l; the gates of every degree, s, from the scalars."""

    def __init__(self, L: int, config: facet.Config):
        super().__init__(L, config)
        C = config.channels
        self.W1, self.Ws = facet.Linear(L, C, C), facet.randn(C, (L + 1) * C, fan_in=C)
        self.b = nn.Parameter(torch.zeros((L + 1) * C, dtype=torch.float64))
        self.register_buffer("degree_of_row", facet.degree_of_row(L)[1:], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, M, C] → [N, M, C]."""
        s = torch.addmm(self.b, x[:, 0], self.Ws).view(len(x), -1, x.shape[2])  # [N, L+1, C]
        gates = torch.sigmoid(s).index_select(1, self.degree_of_row)  # [N, M-1, C]
        return x + self.W3(torch.cat([silu(s[:, :1]), gates * self.W1(x)[:, 1:]], 1))


class TensorProduct(facet.ProductGrid):
    """The product of ProductGrid without a grid, by Clebsch-Gordan coupling and with a weight for every path:

        f[l3m3,c] = σ(s)_c Σ_l1,l2 w[l1l2l3,c] Σ_m1,m2 G[m1,m2,m3] u[l1m1,c] v[l2m2,c]

    u, v, gates and what surrounds them are as there; with certain fixed weights w the numbers are the same. One dense product
    with G for all paths: for a hundred atoms that is faster than path by path, as e3nn does it.
    """

    def __init__(self, L: int, config: facet.Config):
        super().__init__(L, config)
        coupling = facet.Density(L, L, replace(config, degree=L))  # has the same paths
        self.register_buffer("G", coupling.G, persistent=False)  # [l3 m3 Q, m1 m2]
        self.w = nn.ParameterList(facet.randn(Q, config.channels, fan_in=Q) for Q in coupling.counts)

    def forward(self, x: Tensor) -> Tensor:
        """[N, M, C] → [N, M, C]."""
        u, v = self.W12(x).chunk(2, -1)  # 2 × [N, M, C]
        v = v * ((1 + v.square().mean((1, 2), keepdim=True)) / 2).rsqrt()  # [N, M, C]
        A = self.G @ (u[:, :, None] * v[:, None]).flatten(1, 2)  # [N, l3 m3 Q, C]
        A = A.split([(2 * l + 1) * len(w) for l, w in enumerate(self.w)], 1)  # [N, m3 Q, C] for each l3
        f = torch.cat([(a.view(len(x), -1, *w.shape) * w).sum(2) for a, w in zip(A, self.w)], 1)  # [N, M, C]
        s = torch.addmm(self.b, x[:, 0], self.Ws)  # [N, C]
        f = f * torch.sigmoid(s)[:, None]  # [N, M, C]
        f = torch.cat([f[:, :1] + silu(s)[:, None], f[:, 1:]], 1)  # [N, M, C]
        return x + self.W3(f)


# ─── The variants ────────────────────────────────────────────────────────────────────────────────────────────────────

def radial(kind: type, trained: bool = True) -> Callable:
    """A swap: other radial functions."""
    def swap(model):
        count = model.splines.coefficients.shape[1]
        model.splines = kind(count, model.config)
        if not trained:
            model.splines.requires_grad_(False)
    return swap


def edge_wise_mlp(model: facet.Facet) -> None:
    """The functions stay Bessel functions; the densities put an MLP on top."""
    radial(BesselLinear, trained=False)(model)
    each_layer(model, "density", lambda l_in, l_out: EdgeWiseMLP(l_in, l_out, model.config))


def update(kind: type, grid_degree: int = 0) -> Callable:
    """A swap: another node update. Scalars (the last layer) need no grid, so there its degree is not raised."""
    def swap(model):
        each_layer(model, "grid", lambda _, L: kind(L, replace(model.config, grid_degree=grid_degree if L else 0)))
    return swap


def edge_wise(model: facet.Facet) -> None:
    each_layer(model, "density", lambda l_in, l_out: EdgeList(l_in, l_out, model.config))


@dataclass(frozen=True)
class Variant:
    """How a variant differs from the default model."""
    group: str                                                 # of the table
    swap: Callable[[facet.Facet], None] = lambda model: None   # replaces parts
    config: dict = field(default_factory=dict)                 # fields of facet.Config
    settings: dict = field(default_factory=dict)               # of train_small.Settings
    urgent: bool = False                                       # trained before the others
    exact: bool = True                                         # equivariant up to rounding
    trained: bool = True                                       # no: same numbers as the default


VARIANTS = {
    "default": Variant("default", urgent=True),
    "MLP, edge-wise": Variant("radial", edge_wise_mlp, urgent=True),
    "MLP, shared": Variant("radial", radial(RadialMLP), urgent=True),
    "gate": Variant("update", update(Gate), urgent=True),
    "linear only": Variant("update", update(LinearOnly), urgent=True),
    "tensor product": Variant("update", update(TensorProduct), urgent=True),
    "SiLU, 86 points": Variant("update", update(facet.SiluGrid, 15), urgent=True, exact=False),
    "fixed splines": Variant("radial", radial(facet.RadialSplines, trained=False), urgent=True),
    "Bessel-linear": Variant("radial", radial(BesselLinear), urgent=True),
    "edge-wise splines": Variant("density", edge_wise, trained=False),
    **{f"C = {C}": Variant("size", config={"channels": C}) for C in (16, 64, 128)},
    **{f"L = {L}": Variant("size", config={"degree": L}) for L in (1, 3)},
    **{f"T = {T}": Variant("size", config={"layers": T}) for T in (1, 2, 4)},
    **{f"B = {B}": Variant("radial", config={"groups": B}) for B in (4, 16)},
    **{f"SiLU, {P} points": Variant("update", update(facet.SiluGrid, degree), exact=False)
       for P, degree in ((26, 7), (50, 11), (194, 23), (302, 29))},
    "MLP, edge-wise, lr/3": Variant("radial", edge_wise_mlp, settings={"lr": train_small.Settings.lr / 3}),
    "default, lr/3": Variant("radial", settings={"lr": train_small.Settings.lr / 3}),
}


def build(name: str, config: facet.Config, dtype: torch.dtype = torch.float32) -> facet.Facet:
    """The model of a variant; config has the statistics of the training set."""
    model = facet.Facet(replace(config, **VARIANTS[name].config), dtype)
    VARIANTS[name].swap(model)
    return model.to(dtype)


def check(name: str) -> dict[str, float]:
    """Relative errors of forces when the crystal is rotated and reflected, and of second derivatives (central differences)."""
    torch.manual_seed(0)
    model, crystal = build(name, facet.Config(("C", "Si"), mean_neighbours=28.0), torch.float64), facet.random_alloy(8)
    R = torch.from_numpy(-np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0])  # generic: 90° proves nothing
    batch = facet.make_batch([facet.find_neighbours(crystal, model.config)], model.config.cutoff, torch.float64)
    here, there = model(batch)["forces"] @ R.T, model(batch._replace(vectors=batch.vectors @ R.T))["forces"]
    parameters = [p for p in model.parameters() if p.requires_grad]
    direction, step = [torch.randn_like(p) for p in parameters], 1e-5
    loss = model(batch, training=True)["forces"].square().mean()
    slopes = torch.autograd.grad(loss, parameters, materialize_grads=True)
    slope, values = float(sum((g * d).sum() for g, d in zip(slopes, direction))), []
    for sign in (1, -2):
        torch._foreach_add_([p.data for p in parameters], direction, alpha=sign * step)
        values.append(float(model(batch)["forces"].square().mean()))
    result = {"rotation_error": float((there - here).norm() / here.norm()),
              "derivative_error": abs((values[0] - values[1]) / (2 * step) / slope - 1)}
    assert np.isfinite(slope) and result["derivative_error"] < 1e-4, (name, result)
    assert not VARIANTS[name].exact or result["rotation_error"] < 1e-10, (name, result)  # float64
    return result


# ─── Timings and memory ──────────────────────────────────────────────────────────────────────────────────────────────

@functools.cache
def dataset(folder: Path, name: str) -> tuple[list, list, facet.Config]:
    """Frames to train on and to test, with neighbours, and the configuration of the default model."""
    settings = train_small.Settings()
    train, test = (train_small.read((str(folder / SETS[name].format(part)),)) for part in ("train", "test"))
    return train, test, train_small.configure(train, test, settings)


def make_step(name: str, data: tuple, batch_atoms: int) -> Callable:
    """One training step on always the same batch, the optimizers included, as train_small.train_model makes it."""
    torch.manual_seed(0)
    train, _, config = data
    model, s = build(name, config), train_small.Settings()
    atoms, crowd = train_small.sizes(train)
    rows = next(train_small.epochs(atoms, crowd, batch_atoms * crowd.mean(), 0))[0]
    _, batch, target = train_small.Samples(train)[rows]
    named = list(model.named_parameters())
    optimizers = [torch.optim.AdamW([p for n, p in named if ".mix.W" not in n], lr=1e-6),  # the weights shall hardly move
                  torch.optim.Muon([p for n, p in named if ".mix.W" in n], lr=1e-6)]

    def step() -> None:
        energy, forces, virial = train_small.losses(model, batch, target, s.huber)
        model.zero_grad()
        (energy + forces + s.stress_weight * virial).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        for optimizer in optimizers:
            optimizer.step()
    return step


def make_evaluation(name: str) -> Callable:
    """Energy, forces and stress of 64 silicon atoms, neighbours given."""
    torch.manual_seed(0)
    model, crystal = build(name, facet.Config(("Si",))).requires_grad_(False), silicon(2)
    batch = facet.make_batch([facet.find_neighbours(crystal, model.config)], model.config.cutoff)
    return lambda: model(batch)


def megabytes(step: Callable) -> float:
    """What a training step keeps for its derivatives, each piece of memory once. Tensors that come and go are not in it."""
    kept = {}  # holding them keeps their addresses from being used again

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storage.nbytes() for storage in kept.values()) / 1e6


def measure(args, names: list[str]) -> dict:
    """For each variant: errors of the check, parameters, megabytes and milliseconds. What is timed runs in turn."""
    data = {name: dataset(args.data, name) for name in args.sets}
    rows = {name: check(name) for name in names}
    jobs = {("evaluation", name): make_evaluation(name) for name in names}
    jobs |= {(key, name): make_step(name, data[key], args.batch_atoms) for key in args.sets for name in names}
    for name, row in rows.items():
        model = build(name, next(iter(data.values()))[2])
        row["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        row["step_MB"] = {key: megabytes(jobs[key, name]) for key in args.sets}
        row["step_ms"] = {}
    for (kind, name), ms in in_turn(jobs, args.seconds, time.process_time).items():
        if kind == "evaluation":
            rows[name]["evaluation_ms"] = ms
        else:
            rows[name]["step_ms"][kind] = ms
    return {"batch_atoms": args.batch_atoms, "seconds": args.seconds, "load": os.getloadavg()[0], "variants": rows}


# ─── Training ────────────────────────────────────────────────────────────────────────────────────────────────────────

def steps_in_equal_time(steps: int, row: dict, default: dict, key: str) -> int:
    """How many steps of a variant take as long as these of the default; the same number where the difference is small."""
    ratio = default["step_ms"][key] / row["step_ms"][key]
    return steps if abs(ratio - 1) < EQUAL else max(1, round(ratio * steps))


def plan(args, names: list[str], rows: dict) -> list[dict]:
    """All runs, the most important first: urgent variants, after equal steps and then after equal time; then the others."""
    runs = []
    for urgent in (True, False):
        for budget in ("steps", "time"):
            for name in (n for n in names if VARIANTS[n].trained and VARIANTS[n].urgent == urgent):
                for seed in range(args.seeds):
                    for key in args.sets:
                        equal = steps_in_equal_time(args.steps, rows[name], rows["default"], key)
                        if budget == "steps" or equal != args.steps:
                            runs.append({"set": key, "variant": name, "seed": seed, "budget": budget, "base": args.steps,
                                         "batch_atoms": args.batch_atoms, "steps": equal if budget == "time" else args.steps})
    return runs


def same(a: dict, b: dict) -> bool:
    """Are two runs one? The steps in equal time may have been measured anew; the run that is there then stays."""
    return all(a[key] == b[key] for key in ("set", "variant", "seed", "budget", "base", "batch_atoms"))


def train(folder: Path, run: dict) -> dict:
    """Train and test once, in a process of its own; the run with its errors, NaN where the training diverged."""
    torch.set_num_threads(1)
    frames, test, config = dataset(folder, run["set"])
    settings = replace(train_small.Settings(), steps=run["steps"], seed=run["seed"], batch_atoms=run["batch_atoms"],
                       **VARIANTS[run["variant"]].settings)
    torch.manual_seed(run["seed"])
    model, start = build(run["variant"], config), time.process_time()
    with tempfile.TemporaryDirectory() as where, open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        try:
            model, _ = train_small.train_model(model, frames, test[:1], settings, Path(where))  # one frame: watching is slow
        except train_small.BadInput as reason:
            return {**run, ENERGY: np.nan, FORCE: np.nan, "diverged": str(reason).split(", ")[0]}
    core_seconds = time.process_time() - start
    return {**run, **train_small.errors(train_small.predict(model, test, 256), test), "core_seconds": core_seconds}


def train_all(args, runs: list[dict], content: dict) -> None:
    """The runs that are not there yet, several at a time; saved after each."""
    def wanted(found):
        return [run for run in runs if not any(same(run, other) for other in found)]
    left, rows = wanted(content["runs"]), content["timings"]["variants"]
    minutes = [run["steps"] * rows[run["variant"]]["step_ms"][run["set"]] / 60000 for run in left]
    print(f"{len(runs)} runs, {len(left)} to do: about {sum(minutes):.0f} core-minutes", flush=True)
    for group in dict.fromkeys(VARIANTS[run["variant"]].group for run in left):
        mine = [m for run, m in zip(left, minutes) if VARIANTS[run["variant"]].group == group]
        print(f"    {group:8s} {len(mine):4d} runs {sum(mine):6.0f} core-minutes", flush=True)
    with ProcessPoolExecutor(args.parallel, get_context("spawn")) as pool:
        futures = [pool.submit(train, args.data, run) for run in left]
        for done, future in enumerate(as_completed(futures), 1):
            run = future.result()
            content["runs"].append(run)
            write_results("ablations", content)
            print(f"{done:4d}/{len(left)} {run['set']:8s} {run['variant']:20s} seed {run['seed']}, equal {run['budget']}: "
                  f"{run['steps']} steps, {run[ENERGY]:.2f} meV/atom, {run[FORCE]:.4f} eV/Å", flush=True)


# ─── Report ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def summarize(args, names: list[str], runs: list[dict], rows: dict) -> dict:
    """{set: {variant: {budget: {error: [mean, standard deviation], "seeds": …, "steps": …}}}}"""
    summary = {key: {name: {} for name in names} for key in args.sets}
    for key, variants in summary.items():
        for name, found in variants.items():
            for budget in ("steps", "time"):
                wanted = {"set": key, "variant": name, "budget": budget, "base": args.steps, "batch_atoms": args.batch_atoms}
                mine = [run for run in runs if run.items() >= wanted.items()]
                if mine:
                    found[budget] = {"seeds": len(mine), "steps": mine[0]["steps"]} | {
                        error: [float(np.mean([run[error] for run in mine])), float(np.std([run[error] for run in mine],
                                ddof=len(mine) > 1))] for error in (ENERGY, FORCE)}
            if "steps" in found and steps_in_equal_time(args.steps, rows[name], rows["default"], key) == args.steps:
                found.setdefault("time", found["steps"])  # one training serves for both
    return summary


def print_table(summary: dict, rows: dict) -> None:
    """One table per set, in markdown."""
    def cells(found):
        if not found:
            return "– | – | –"
        (e, de), (f, df) = found[ENERGY], found[FORCE]
        return f"{found['steps']} × {found['seeds']} | {e:.2f} ± {de:.2f} | {1000 * f:.1f} ± {1000 * df:.1f}"
    for key, variants in summary.items():
        print(f"\n{key}: test MAE of energy (meV/atom) and forces (meV/Å), mean ± standard deviation over seeds; one thread\n\n"
              "| variant | parameters | evaluation, 64 Si (ms) | step (ms) | step (MB) | equal steps × seeds | energy | forces "
              "| equal time: steps × seeds | energy | forces |\n|---|" + "---:|" * 10)
        for name, found in variants.items():
            row = rows[name]
            print(f"| {name} | {row['parameters']} | {row['evaluation_ms']:.1f} | {row['step_ms'][key]:.0f} "
                  f"| {row['step_MB'][key]:.0f} | {cells(found.get('steps'))} | {cells(found.get('time'))} |")


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the (time, error) that no other beats in both, in the order of time."""
    best, names = np.inf, []
    for name, (_, error) in sorted(points.items(), key=lambda item: item[1]):
        if error < best:
            best = error
            names.append(name)
    return names


def points_of(variants: dict, rows: dict, key: str) -> dict[str, tuple[float, float]]:
    """(ms of a training step, force MAE in meV/Å after equal steps) of what has been trained without diverging."""
    return {name: (rows[name]["step_ms"][key], 1000 * found["steps"][FORCE][0]) for name, found in variants.items()
            if found.get("steps") and np.isfinite(found["steps"][FORCE][0])}


def picture_of(variants: dict, rows: dict, key: str) -> dict:
    """What pictures.py draws: (ms, error, spread over seeds) of each group's variants beside the default's, and the front of all."""
    found = points_of(variants, rows, key)
    points = {name: (*point, 1000 * variants[name]["steps"][FORCE][1]) for name, point in found.items()}
    groups = {VARIANTS[name].group for name in points} - {"default"}
    return {"front": [found[name] for name in front(found)],
            "groups": {group: {name: p for name, p in points.items() if VARIANTS[name].group in (group, "default")} for group in sorted(groups)}}


def answers(summary: dict, rows: dict) -> dict:
    """Each variant over the default: time, memory, and the difference of the force errors beside the spread of the seeds."""
    result = {}
    for key, variants in summary.items():
        print(f"\n{key}, over the default: time of evaluation, of a step, memory; force MAE after equal steps | equal time")
        ours, result[key] = rows["default"], {}
        for name, found in variants.items():
            row, words = rows[name], []
            entry = {"evaluation": row["evaluation_ms"] / ours["evaluation_ms"],
                     "step": row["step_ms"][key] / ours["step_ms"][key], "memory": row["step_MB"][key] / ours["step_MB"][key]}
            for budget in ("steps", "time"):
                if name != "default" and found.get(budget) and variants["default"].get("steps"):
                    (a, spread_a), (b, spread_b) = found[budget][FORCE], variants["default"]["steps"][FORCE]
                    spread = sqrt(spread_a ** 2 + spread_b ** 2)
                    entry[budget] = {"difference": a - b, "spread": spread}
                    verdict = "within the spread" if abs(a - b) <= spread else "worse" if a > b else "better"
                    verdict = verdict if min(found[budget]["seeds"], variants["default"]["steps"]["seeds"]) > 1 else "one seed"
                    words.append(f"{100 * (a / b - 1):+6.1f} % ± {100 * spread / b:.1f}, {verdict}")
            result[key][name] = entry
            print(f"    {name:22s} {entry['evaluation']:5.2f} {entry['step']:5.2f} {entry['memory']:5.2f}   ", " | ".join(words))
        result[key]["front"] = front(points_of(variants, rows, key))
        print("    front of force MAE against time of a step:", ", ".join(result[key]["front"]))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=["Si", "crystals"], choices=SETS)
    parser.add_argument("--only", nargs="+", choices=["radial", "update", "density", "size"], help="groups")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_atoms", type=int, default=126, help="atoms per step: two cells of the silicon set")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2, help="trainings at a time, each on one thread")
    parser.add_argument("--timings", action="store_true", help="measure time and memory anew; train nothing")
    parser.add_argument("--seconds", type=float, default=300, help="of measuring")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    content = {"runs": []} | read_results("ablations")
    names = [name for name, v in VARIANTS.items() if not args.only or v.group in (*args.only, "default")]
    if args.timings:
        content["timings"] = measure(args, list(VARIANTS))
        write_results("ablations", content)
    rows = content.get("timings", {}).get("variants", {})
    if not all(name in rows and key in rows[name]["step_ms"] for name in names for key in args.sets):
        parser.error("measure first: the same command, with all sets, and --timings")
    if not (args.timings or args.draw):
        train_all(args, plan(args, names, rows), content)
    summary = summarize(args, names, content["runs"], rows)
    print_table(summary, rows)
    picture = {key: one for key, variants in summary.items() if (one := picture_of(variants, rows, key))["front"]}
    if args.draw and not picture:
        parser.error("nothing has been trained with these --sets, --steps and --batch_atoms")
    found = {"steps": args.steps, "summary": summary, "answers": answers(summary, rows), "picture": picture}
    write_results("ablations", content | found, measured=not args.draw)
    if picture:
        draw_results("ablations")


if __name__ == "__main__":
    main()
