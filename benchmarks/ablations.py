"""Which parts of Facet earn their place? Swap one at a time; compare accuracy, time and memory.

    python benchmarks/ablations.py --data FOLDER --updates     # the node update alone: minutes
    python benchmarks/ablations.py --data FOLDER --timings     # on a quiet machine: minutes
    python benchmarks/ablations.py --data FOLDER --parallel 2  # then train: many hours; resumes
    python benchmarks/ablations.py --data FOLDER --device cuda --parallel 8    # on a GPU: minutes
    python benchmarks/ablations.py --data FOLDER --draw        # only print and draw what there is

    radial   splines against MLPs (shared like ours, or edge-wise as in MACE and NequIP),
             Bessel-linear, fixed splines, B
    update   the exact product grid against the paper's SiLU grid, gate, linear only, tensor product
    density  sum over neighbours first against edge by edge: the same numbers, so only time and
             memory are measured
    size     degree L, channels C, layers T
    degree   other node updates at L = 1 and 3

Every variant is the default model with one part replaced by a small subclass of facet.py's, or one
number of its Config changed; everything else, learning rates included, stays as train_small.py has
it. Test errors are given after equal steps, beside the time of a step on a CPU. Times are
milliseconds of one core, the processor's own count. All in float32. FOLDER is as in accuracy.py.
Each run is saved when it ends, to benchmarks/results/ablations.json; delete that file to begin
anew. In the end come the table and the picture.
"""
from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import product
from math import sqrt
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from common import (
    SETS,
    columns,
    command_line,
    each_layer,
    in_turn,
    read_results,
    read_set,
    rows,
    silicon,
    write_results,
)
from density import EdgeWiseDensity
from pictures import draw_results
from summary import ENERGY, FORCE, ablation_errors, ablations, updates
from torch import Tensor, nn
from torch.nn.functional import silu

import facet
import train_small
from tools import batches, evaluate
from tools.properties import IMPROPER, random_alloy

# ─── Radial functions ────────────────────────────────────────────────────────────────────────────


class BesselLinear(facet.RadialSplines):
    """φ(r) = Σ_n W[n, φ] β_n(r): the B sine-Bessel functions β_n as basis, in place of splines.

    Starts as the splines do.
    """

    def __init__(self, count: int, config: facet.Config):
        super().__init__(count, replace(config, splines=config.groups))

    def basis(self, r: Tensor) -> Tensor:
        """r [...] Å → [..., B]."""
        x = (r[..., None] / self.cutoff).clamp(max=1)  # [..., 1]
        n = torch.arange(1, len(self.coefficients) + 1, device=r.device)  # [B]
        envelope = 1 - 28 * x**6 + 48 * x**7 - 21 * x**8
        return sqrt(2 / 3) * torch.pi * n * torch.sinc(n * x) * envelope


class MLP(nn.Module):
    """y = W₃ s(W₂ s(W₁ x)), two hidden layers of 64, s = silu/0.6 of unit variance.

    No biases: 0 → 0 at the cutoff.
    """

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__()
        matrices = [(fan_in, 64), (64, 64), (64, fan_out)]
        self.W = nn.ParameterList(facet.randn(a, b, fan_in=a) for a, b in matrices)

    def forward(self, x: Tensor) -> Tensor:
        """[..., fan_in] → [..., fan_out]."""
        for W in self.W[:-1]:
            x = silu(x @ W) / 0.6  # [..., 64]
        return x @ self.W[-1]  # [..., fan_out]


class RadialMLP(BesselLinear):
    """φ(r) = MLP_t(β(r)): one MLP per layer t gives the functions that our splines give."""

    def __init__(self, count: int, config: facet.Config):
        super().__init__(count, config)
        self.coefficients.requires_grad_(False)  # only their number counts here
        T = config.layers
        self.mlps = nn.ModuleList(MLP(config.groups, count // T) for _ in range(T))

    def forward(self, r: Tensor) -> Tensor:
        """r [N, K] Å → [N, K, count]. Only what lies within the cutoff goes through the MLPs."""
        inside = r < self.cutoff  # [N, K]; padding can be most of K
        beta = self.basis(r[inside])  # [E, B]
        phi = torch.cat([mlp(beta) for mlp in self.mlps], -1)  # [E, count]
        return phi.new_zeros(*r.shape, phi.shape[1]).index_put((inside,), phi)  # [N, K, count]


class EdgeList(EdgeWiseDensity):
    """The density edge by edge as most codes do it, with a list of edges and a scatter sum.

        A[i,p,m3,c] = Σ_j R_pc(r_ij) Σ_m1 T[ij,p,m3,m1] h[j,l1m1,c]
        R_pc = φ_b,l2 as in facet.Density

    Unlike in its parent nothing is padded: in a batch of different crystals more than half of the
    places can be padding.
    """

    def __init__(self, l_in: int, l_out: int, config: facet.Config):
        super().__init__(l_in, l_out, config)
        self.widths = []  # rows of each path, for each l1
        for l1 in range(l_in + 1):
            self.widths.append([2 * path[2] + 1 for path in self.paths if path[0] == l1])

    def radial(self, phi: Tensor, C: int) -> list[Tensor]:
        """φ [E, B, L+1] → R of each path, [E, 1, C]."""
        phi = phi.repeat_interleave(C // phi.shape[1], 1)[:, None]  # [E, 1, C, L+1]
        return [phi[..., l2] for _, l2, _ in self.paths]  # [E, 1, C] for each path

    def forward(self, h: Tensor, index: Tensor, phi: Tensor, Y: Tensor) -> Tensor:
        """As facet.Density."""
        N, C = len(h), h.shape[2]
        B = index.shape[1]

        # the edges: what lies within the cutoff
        dst, slot = phi.detach()[..., 0].any(1).nonzero(as_tuple=True)  # [E], [E]
        src = index[dst, 0, slot] // B  # [E]
        radial = self.radial(phi.transpose(1, 2)[dst, slot], C)  # [E, 1, C] for each path
        Y = Y[dst, slot]  # [E, m2]

        # messages, path by path
        sums = []
        path = 0
        for l1, widths in enumerate(self.widths):
            h_src = h[:, facet.rows_of(l1)].index_select(0, src)  # [E, m1, C]
            T = (Y @ getattr(self, f"G{l1}")).view(len(dst), -1, 2 * l1 + 1)  # [E, rows, m1]
            messages = torch.bmm(T, h_src) if l1 else T * h_src  # [E, rows, C]
            for message in messages.split(widths, 1):
                total = h.new_zeros(N, message.shape[1], C)  # [N, m3, C]
                sums.append(total.index_add(0, dst, message * radial[path]))
                path += 1

        return torch.cat(sums, 1).index_select(1, self.back)  # [N, J, C]


class EdgeWiseMLP(EdgeList):
    """As MACE and NequIP: every path and channel has a radial function of its own, MLP(β(r)).

    Wants φ_b,l = β_b.
    """

    def __init__(self, l_in: int, l_out: int, config: facet.Config):
        super().__init__(l_in, l_out, config)
        self.mlp = MLP(config.groups, len(self.paths) * config.channels)

    def radial(self, phi: Tensor, C: int) -> list[Tensor]:
        """φ [E, B, L+1] → R of each path, [E, 1, C]."""
        return self.mlp(phi[..., 0]).view(len(phi), 1, -1, C).unbind(2)  # [E, 1, C] for each path


# ─── Node update ─────────────────────────────────────────────────────────────────────────────────


class LinearOnly(nn.Module):
    """x → x + W₃ x: no non-linearity but the product of features and geometry in the density."""

    def __init__(self, L: int, config: facet.Config):
        super().__init__()
        self.W3 = facet.Linear(L, config.channels, config.channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, M, C] → [N, M, C]."""
        return x + self.W3(x)


class Gate(LinearOnly):
    """x → x + W₃ f as in NequIP: f_0 = silu(s_0), f_l = σ(s_l) ⊙ (W₁ x)_l, s from the scalars."""

    def __init__(self, L: int, config: facet.Config):
        super().__init__(L, config)
        C = config.channels
        self.W1 = facet.Linear(L, C, C)
        self.Ws = facet.randn(C, (L + 1) * C, fan_in=C)
        self.b = nn.Parameter(torch.zeros((L + 1) * C, dtype=torch.float64))
        self.register_buffer("degree_of_row", facet.degree_of_row(L)[1:], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, M, C] → [N, M, C]."""
        s = torch.addmm(self.b, x[:, 0], self.Ws).view(len(x), -1, x.shape[2])  # [N, L+1, C]
        gates = torch.sigmoid(s).index_select(1, self.degree_of_row)  # [N, M-1, C]
        return x + self.W3(torch.cat([silu(s[:, :1]), gates * self.W1(x)[:, 1:]], 1))


class TensorProduct(facet.ProductGrid):
    """The product of ProductGrid without a grid, by Clebsch-Gordan coupling with weights per path.

        f[l3m3,c] = σ(s)_c Σ_l1,l2 w[l1l2l3,c] Σ_m1,m2 G[m1,m2,m3] u[l1m1,c] v[l2m2,c]

    u, v, gates and what surrounds them are as there; with certain fixed weights w the numbers are
    the same. One dense product with G for all paths: for a hundred atoms that is faster than path
    by path, as e3nn does it.
    """

    def __init__(self, L: int, config: facet.Config):
        super().__init__(L, config)
        coupling = facet.Density(L, L, replace(config, degree=L))  # has the same paths
        G = coupling.G * sqrt(config.mean_neighbours)  # [J, m1 m2]
        self.register_buffer("G", G, persistent=False)
        weights = [facet.randn(Q, config.channels, fan_in=Q) for Q in coupling.counts]
        self.w = nn.ParameterList(weights)

    def forward(self, x: Tensor) -> Tensor:
        """[N, M, C] → [N, M, C]."""
        u, v = self.W12(x).chunk(2, -1)  # 2 × [N, M, C]
        v = v * ((1 + v.square().mean((1, 2), keepdim=True)) / 2).rsqrt()  # [N, M, C]
        A = self.coupled(u, v)  # [N, J, C]
        A = A.split([(2 * l + 1) * len(w) for l, w in enumerate(self.w)], 1)  # [N, m3 Q, C]
        parts = []
        for a, w in zip(A, self.w, strict=True):
            parts.append((a.view(len(x), -1, *w.shape) * w).sum(2))  # [N, m3, C]
        f = torch.cat(parts, 1)  # [N, M, C]
        s = torch.addmm(self.b, x[:, 0], self.Ws)  # [N, C]
        f = f * torch.sigmoid(s)[:, None]  # [N, M, C]
        f = torch.cat([f[:, :1] + silu(s)[:, None], f[:, 1:]], 1)  # [N, M, C]
        return x + self.W3(f)

    def coupled(self, u: Tensor, v: Tensor) -> Tensor:
        """[N, M, C] twice → [N, J, C]."""
        return self.G @ (u[:, :, None] * v[:, None]).flatten(1, 2)  # [N, J, C]


class SparseTensorProduct(TensorProduct):
    """The same numbers, pair by pair of degrees: what is always zero is left out.

    More and smaller products of matrices, which pays at high degrees.
    """

    def __init__(self, L: int, config: facet.Config):
        super().__init__(L, config)
        M = (L + 1) ** 2
        G = self.G.view(-1, M, M)  # [J, m1, m2]
        order = []
        self.pairs = list(product(range(L + 1), repeat=2))
        for l1, l2 in self.pairs:
            block = G[:, facet.rows_of(l1), facet.rows_of(l2)].flatten(1)  # [J, m1 m2]
            outputs = block.abs().sum(1).nonzero()[:, 0]
            order.append(outputs)
            self.register_buffer(f"G{l1}{l2}", block[outputs], persistent=False)
        self.register_buffer("back", torch.cat(order).argsort(), persistent=False)
        del self.G

    def coupled(self, u: Tensor, v: Tensor) -> Tensor:
        """[N, M, C] twice → [N, J, C]."""
        parts = []
        for l1, l2 in self.pairs:
            a = u[:, facet.rows_of(l1), None]  # [N, m1, 1, C]
            b = v[:, None, facet.rows_of(l2)]  # [N, 1, m2, C]
            parts.append(getattr(self, f"G{l1}{l2}") @ (a * b).flatten(1, 2))  # [N, rows, C]
        return torch.cat(parts, 1).index_select(1, self.back)  # [N, J, C]


class E3nnUpdate(nn.Module):
    """x → x + W₃ (W₁ x ⊗ W₂ x) by e3nn, in its own layout; a weight for each path and channel.

    Without gates and without a bound on v, so it does less than TensorProduct.
    """

    def __init__(self, L: int, config: facet.Config):
        from e3nn import o3

        super().__init__()
        C = config.channels
        irreps = o3.Irreps([(C, (l, (-1) ** l)) for l in range(L + 1)])
        paths = [(l1, l2, l3, "uuu", True) for l1, l2, l3 in product(range(L + 1), repeat=3)
                 if abs(l1 - l2) <= l3 <= l1 + l2 and (l1 + l2 + l3) % 2 == 0]
        self.W = nn.ModuleList(o3.Linear(irreps, irreps) for _ in range(3))
        self.product = o3.TensorProduct(irreps, irreps, irreps, paths)

    def forward(self, x: Tensor) -> Tensor:
        """[N, M, C], read as e3nn's [N, M C] → [N, M C]."""
        x = x.flatten(1)  # [N, M C]
        W1, W2, W3 = self.W
        return x + W3(self.product(W1(x), W2(x)))


# ─── The variants ────────────────────────────────────────────────────────────────────────────────


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
    """A swap: another node update."""

    def swap(model):
        config = replace(model.config, grid_degree=grid_degree)
        each_layer(model, "grid", lambda _, L: kind(L, config))

    return swap


def edge_wise(model: facet.Facet) -> None:
    each_layer(model, "density", lambda l_in, l_out: EdgeList(l_in, l_out, model.config))


@dataclass(frozen=True)
class Variant:
    """How a variant differs from the default model."""

    group: str                                                # of the table
    swap: Callable[[facet.Facet], None] = lambda model: None  # replaces parts
    config: dict = field(default_factory=dict)                # fields of facet.Config
    settings: dict = field(default_factory=dict)              # of train_small.Settings
    urgent: bool = False                                      # trained before the others
    exact: bool = True                                        # equivariant up to rounding
    trained: bool = True                                      # no: same numbers as the default


SLOWER = {"lr": train_small.Settings.lr / 3}
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
    "C = 16": Variant("size", config={"channels": 16}),
    "C = 64": Variant("size", config={"channels": 64}),
    "C = 128": Variant("size", config={"channels": 128}),
    "L = 1": Variant("size", config={"degree": 1}),
    "L = 3": Variant("size", config={"degree": 3}),
    "T = 1": Variant("size", config={"layers": 1}),
    "T = 2": Variant("size", config={"layers": 2}),
    "T = 4": Variant("size", config={"layers": 4}),
    "B = 4": Variant("radial", config={"groups": 4}),
    "B = 16": Variant("radial", config={"groups": 16}),
    "SiLU, 26 points": Variant("update", update(facet.SiluGrid, 7), exact=False),
    "SiLU, 50 points": Variant("update", update(facet.SiluGrid, 11), exact=False),
    "SiLU, 194 points": Variant("update", update(facet.SiluGrid, 23), exact=False),
    "SiLU, 302 points": Variant("update", update(facet.SiluGrid, 29), exact=False),
    "MLP, edge-wise, lr/3": Variant("radial", edge_wise_mlp, settings=SLOWER),
    "default, lr/3": Variant("radial", settings=SLOWER),
}
for L, name in product((1, 3), ("gate", "linear only", "tensor product")):
    swap = VARIANTS[name].swap
    VARIANTS[f"L = {L}, {name}"] = Variant("degree", swap, config={"degree": L})


def build(name: str, config: facet.Config, dtype: torch.dtype = torch.float32) -> facet.Facet:
    """The model of a variant; config has the statistics of the training set."""
    model = facet.Facet(replace(config, **VARIANTS[name].config), dtype)
    VARIANTS[name].swap(model)
    return model.to(dtype)


def check(name: str) -> dict[str, float]:
    """Relative errors of forces in a mirror image, and of second derivatives (differences)."""
    torch.manual_seed(0)
    model = build(name, facet.Config(("C", "Si"), mean_neighbours=28.0), torch.float64)
    R = torch.from_numpy(IMPROPER)
    graph = facet.find_neighbours(random_alloy(8), model.config)
    batch = facet.make_batch([graph], model.config.cutoff, torch.float64)
    here = model(batch)["forces"] @ R.T
    there = model(batch._replace(vectors=batch.vectors @ R.T))["forces"]
    rotation = float((there - here).norm() / here.norm())

    # the slope of a loss on forces along a random direction of the parameters
    parameters = [p for p in model.parameters() if p.requires_grad]
    direction = [torch.randn_like(p) for p in parameters]
    loss = model(batch, differentiable=True)["forces"].square().mean()
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    slope = float(sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)))
    step = 1e-5
    values = []
    for sign in (1, -2):
        torch._foreach_add_([p.data for p in parameters], direction, alpha=sign * step)
        values.append(float(model(batch)["forces"].square().mean()))
    derivative = abs((values[0] - values[1]) / (2 * step) / slope - 1)

    assert np.isfinite(slope) and derivative < 1e-4, (name, derivative)
    assert not VARIANTS[name].exact or rotation < 1e-10, (name, rotation)  # float64
    return {"rotation_error": rotation, "derivative_error": derivative}


# ─── Timings and memory ──────────────────────────────────────────────────────────────────────────


@functools.cache
def dataset(folder: Path, name: str) -> tuple:
    """Frames to train on and to test, and the configuration of the default model."""
    train, tests = read_set(folder, name)
    test = next(iter(tests.values()))
    config, _ = train_small.statistics(train, train_small.Settings())
    return train, test, config


def make_step(name: str, data: tuple, batch_atoms: int) -> Callable:
    """One training step on always the same batch, the optimizers included, as in train_small."""
    torch.manual_seed(0)
    train, _, config = data
    model = build(name, config)
    s = train_small.Settings(lr=1e-6, muon_lr=1e-6)  # the weights shall hardly move
    samples = train_small.Samples(train, config)
    crowd = samples.crowd()
    batch_atoms = batch_atoms or batches.ten_structures(train)
    plan = next(batches.epochs(samples.atoms, crowd, batch_atoms * crowd.mean(), 0))
    _, batch, target = samples[plan[0]]
    optimizers = train_small.optimizers(model, s, 1000)
    weights = train_small.loss_weights(s, 1.0)

    def step() -> None:
        out = model(batch, differentiable=True)
        parts = train_small.losses(out, target, target["count"], config.energy_scale, s.huber)
        model.zero_grad()
        train_small.weighted(weights, parts).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train_small.CLIP)
        for optimizer in optimizers:
            optimizer.step()

    return step


def make_evaluation(name: str) -> Callable:
    """Energy, forces and stress of 64 silicon atoms, neighbours given."""
    torch.manual_seed(0)
    model = build(name, facet.Config(("Si",))).requires_grad_(False)
    graph = facet.find_neighbours(silicon(2), model.config)
    batch = facet.make_batch([graph], model.config.cutoff)
    return lambda: model(batch)


def megabytes(step: Callable, module: nn.Module | None = None) -> float:
    """What a training step keeps for its derivatives, each piece of memory once.

    Tensors that come and go are not in it, nor those of the module, which are there anyway.
    """
    kept = {}  # holding them keeps their addresses from being used again

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    for tensor in (*module.parameters(), *module.buffers()) if module else ():
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values()) / 1e6


def measure(args, names: list[str]) -> dict:
    """Of each variant: errors of the check, parameters, megabytes, milliseconds (timed in turn)."""
    data = {key: dataset(args.data, key) for key in args.sets}
    table = {name: {"variant": name, "group": VARIANTS[name].group, **check(name)}
             for name in names}
    jobs = {}
    for name in names:
        jobs["evaluation", name] = make_evaluation(name)
        for key in args.sets:
            jobs[key, name] = make_step(name, data[key], args.batch_atoms)

    for name, row in table.items():
        model = build(name, data[args.sets[0]][2])
        row["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        row["step_MB"] = {key: megabytes(jobs[key, name]) for key in args.sets}
        row["step_ms"] = {}
    for (kind, name), ms in in_turn(jobs, args.seconds, time.process_time).items():
        if kind == "evaluation":
            table[name]["evaluation_ms"] = ms
        else:
            table[name]["step_ms"][kind] = ms
    return {
        "batch_atoms": args.batch_atoms, "seconds": args.seconds, "load": os.getloadavg()[0],
        "variants": columns(list(table.values()))}


UPDATES = {"product grid": facet.ProductGrid, "SiLU grid": facet.SiluGrid, "gate": Gate,
           "linear only": LinearOnly, "tensor product, dense": TensorProduct,
           "tensor product, by pairs": SparseTensorProduct}
UPDATED = 256  # atoms whose node update is timed alone


def make_update(module: nn.Module, x: Tensor) -> tuple[Callable, Callable]:
    """A call without gradients, and one with those for weights and features, x [N, M, C]."""
    def call() -> None:
        with torch.no_grad():
            module(x)

    def step() -> None:
        module.zero_grad()
        features = x.clone().requires_grad_()  # [N, M, C]
        module(features).square().sum().backward()

    return call, step


def measure_updates(seconds: float) -> dict:
    """Of the node update alone at L = 1 … 6: milliseconds of a call and of a call with all its
    gradients, and the megabytes that are kept for these. With e3nn's, where it is installed.
    """
    kinds = dict(UPDATES)
    if find_spec("e3nn"):
        kinds["tensor product, e3nn"] = E3nnUpdate
    jobs = {}
    kept = {}
    for L, (kind, update) in product(range(1, 7), kinds.items()):
        torch.manual_seed(0)
        x = torch.randn(UPDATED, (L + 1) ** 2, facet.Config.channels)  # [N, M, C]
        module = update(L, facet.Config(("Si",), degree=L)).float()
        call, step = make_update(module, x)
        jobs[L, kind, "call"] = call
        jobs[L, kind, "step"] = step
        kept[L, kind] = megabytes(step, module)

    ms = in_turn(jobs, seconds, time.process_time)
    table = []
    for (L, kind), MB in kept.items():
        table.append({"L": L, "kind": kind, "forward_ms": ms[L, kind, "call"],
                      "step_ms": ms[L, kind, "step"], "step_MB": MB})
    return {"atoms": UPDATED, "updates": columns(table)}


# ─── Training ────────────────────────────────────────────────────────────────────────────────────


def plan(args, names: list[str]) -> list[dict]:
    """All runs, urgent variants first."""
    runs = []
    for urgent in (True, False):
        chosen = [n for n in names if VARIANTS[n].trained and VARIANTS[n].urgent == urgent]
        for seed, key, name in product(range(args.seeds), args.sets, chosen):
            runs.append({
                "set": key, "variant": name, "seed": seed, "batch_atoms": args.batch_atoms,
                "steps": args.steps})
    return runs


def train(folder: Path, run: dict, device: str) -> dict:
    """Train and test once, in a process of its own; NaN errors where the training diverged."""
    torch.set_num_threads(1)
    frames, test, config = dataset(folder, run["set"])
    settings = train_small.Settings(
        steps=run["steps"], seed=run["seed"], batch_atoms=run["batch_atoms"],
        **VARIANTS[run["variant"]].settings)
    torch.manual_seed(run["seed"])
    model = build(run["variant"], config).to(device)
    nothing = frames[:0]  # there is nothing to choose, so nothing to validate
    with tempfile.TemporaryDirectory() as where, open(os.devnull, "w") as quiet, \
            contextlib.redirect_stdout(quiet):
        try:
            model, _ = train_small.train(model, frames, nothing, settings, Path(where))
        except train_small.BadInput as reason:
            diverged = str(reason).split(", ")[0]
            return {**run, ENERGY: np.nan, FORCE: np.nan, "diverged": diverged}
    errors = evaluate.errors(evaluate.predict(model, test), test)
    return {**run, **errors, "device": device}


def train_all(args, runs: list[dict], content: dict) -> None:
    """The runs that are not there yet, several at a time; saved after each."""
    found = rows(content["runs"])
    left = [run for run in runs if not any(run.items() <= other.items() for other in found)]
    print(f"{len(runs)} runs, {len(left)} to do", flush=True)

    with ProcessPoolExecutor(args.parallel, get_context("spawn")) as pool:
        futures = [pool.submit(train, args.data, run, args.device) for run in left]
        for done, future in enumerate(as_completed(futures), 1):
            if future.exception():  # the others go on, and are kept
                print(f"{done:4d}/{len(left)} failed: {future.exception()}", flush=True)
                continue
            run = future.result()
            found.append(run)
            content["runs"] = columns(found)
            write_results("ablations", content)
            print(
                f"{done:4d}/{len(left)} {run['set']:8s} {run['variant']:20s} seed {run['seed']}: "
                f"{run[ENERGY]:.2f} meV/atom, "
                f"{run[FORCE]:.4f} eV/Å", flush=True)


# ─── Command line ────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    groups = dict.fromkeys(variant.group for variant in VARIANTS.values())
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=["Si", "AcAc"], choices=SETS)
    parser.add_argument("--only", nargs="+", choices=[*groups, *VARIANTS], metavar="NAME",
                        help=f"groups ({', '.join(groups)}) or variants")
    parser.add_argument("--steps", type=int, default=0, help="0: a whole training")
    parser.add_argument("--batch_atoms", type=int, default=0,
                        help="atoms per step; 0: as train_small.py has it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2,
                        help="trainings at a time, each on one thread")
    parser.add_argument("--device", default="cpu", help="of the trainings")
    parser.add_argument("--timings", action="store_true",
                        help="measure time and memory of the chosen anew; train nothing")
    parser.add_argument("--seconds", type=float, default=300, help="of measuring")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    parser.add_argument("--updates", action="store_true",
                        help="measure the node update alone at L = 1 … 6; train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)

    if args.updates:
        write_results("updates", measure_updates(args.seconds))
        print("\n".join(updates()))
        draw_results("updates")
        return

    content = {"runs": {}} | read_results("ablations")
    names = [n for n, v in VARIANTS.items()
             if not args.only or {n, v.group} & {*args.only, "default"}]
    if args.timings:
        content["timings"] = measure(args, names)
        write_results("ablations", content)

    if not (args.timings or args.draw):
        content["steps"] = content.get("steps", {}) | dict.fromkeys(args.sets, args.steps)
        train_all(args, plan(args, names), content)
    errors = ablation_errors(content) if content["runs"] else {}
    errors = {name: variants for name, variants in errors.items() if len(variants) > 1}
    timed = {row["variant"]: row["step_ms"]
             for row in rows(content.get("timings", {}).get("variants", {}))}
    untimed = [f"{variant} on {name}" for name, variants in errors.items() for variant in variants
               if name not in timed.get(variant, {})]
    if untimed:
        print(f"no table before --timings of {', '.join(untimed)}")
        return
    for name in errors:
        print("\n".join(ablations(name)) + "\n")
    if errors:
        draw_results("ablations")


if __name__ == "__main__":
    main()
