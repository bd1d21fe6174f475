"""How fast Facet is on this machine's processor, in float32.

    python benchmarks/density.py            # 3 minutes on 2 quiet cores; writes benchmarks/results/density.json
    python benchmarks/density.py --quick    # 20 seconds: few repeats, up to 512 atoms; writes nothing

Prints, at one thread and at two:
    1  the density (facet.py §5) against the edge-wise form of the same layer: their difference, milliseconds and ratio
       of an evaluation (energy and forces) and of a training step, for the layer alone and for the whole model;
    2  the share of the machine's matrix-product peak that the layer reaches;
    3  milliseconds of the whole model from 8 to 10,648 silicon atoms (energy, forces, stress; neighbours given), the
       exponent of the number of atoms, and the memory that 4,096 atoms need;
    4  the share of the neighbour list in an evaluation through the ASE calculator;
and the goals, with what was reached. What is compared is timed in turn, in one process; numbers are medians. Other
programs spoil them, at two threads most of all: the load is printed and kept. For Linux and macOS.

Where fresh memory is slow to get (virtual machines), the edge-wise form and crystals of 10,000 atoms pay for it. With
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 in front of the command glibc reuses its memory: compare both.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from math import log
from pathlib import Path

import ase.build
import numpy as np
import torch
from torch import Tensor

from common import clock, each_layer, hardware, in_turn, rattled, silicon, write_results

import facet

JOBS = ("energy+forces", "training step")


# ─── 1 Density against edge-wise ─────────────────────────────────────────────────────────────────────────────────────

class EdgeWiseDensity(facet.Density):
    """The same layer evaluated as it is written, edge by edge: what codes do whose radial functions come from an MLP.

        A[i,p,m3,c] = Σ_j R_pc(r_ij) Σ_m1 T[ij,p,m3,m1] h[j,l1m1,c],     T[ij,p,m3,m1] = Σ_m2 G[m1,m2,m3] Y_l2m2(r̂_ij)

    Kept fast: neighbours are padded, so that sums need no index_add; T is made once per edge for all paths; one batched
    product per l1; rows in the order of l1 and l2, so that R is not repeated for the m3 and l3 that share it.
    """

    def __init__(self, l_in: int, l_out: int, config: facet.Config):
        super().__init__(l_in, l_out, config)
        l1l2 = [self.paths[q][:2] for l in range(l_out + 1) for _ in range(2 * l + 1)
                for q, (*_, l3) in enumerate(self.paths) if l3 == l]  # of each row l3 m3 Q of G
        order = sorted(range(len(l1l2)), key=lambda row: l1l2[row])
        self.pairs = [{l2: l1l2.count((l1, l2)) for l2 in range(config.degree + 1) if (l1, l2) in l1l2}
                      for l1 in range(l_in + 1)]  # for each l1 the rows that an l2 has
        blocks = self.G.view(len(order), -1, (l_in + 1) ** 2)[order].split([sum(p.values()) for p in self.pairs])
        for l1, G in enumerate(blocks):
            self.register_buffer(f"G{l1}", G[..., facet.degree(l1)].transpose(0, 1).flatten(1))  # [m2, rows m1]
        self.register_buffer("back", torch.tensor(order).argsort())  # the order of facet.Density

    def forward(self, h: Tensor, index: Tensor, phi: Tensor, Y: Tensor) -> list[Tensor]:
        """As facet.Density."""
        (N, _, C), (_, B, _, K) = h.shape, phi.shape
        src = index.view(N, B, K)[:, 0].flatten() // B  # [N K]
        radial = phi.permute(2, 0, 3, 1).repeat_interleave(C // B, -1)[..., None, :]  # [L+1, N, K, 1, C]
        Y, sums = (self.scale * Y).mT.reshape(N * K, -1), []  # [N K, m2]
        for l1, pairs in enumerate(self.pairs):
            h_src = h[:, facet.degree(l1)].flatten(1).index_select(0, src).view(N * K, -1, C)  # [N K, m1, C]
            T = (Y @ getattr(self, f"G{l1}")).view(N * K, -1, 2 * l1 + 1)  # [N K, rows, m1]
            messages = (torch.bmm(T, h_src) if l1 else T * h_src).view(N, K, -1, C).split(list(pairs.values()), 2)
            sums += [(message * radial[l2]).sum(1) for l2, message in zip(pairs, messages)]  # [N, rows of l1 l2, C]
        A = torch.cat(sums, 1).index_select(1, self.back).split([(2 * l + 1) * Q for l, Q in enumerate(self.counts)], 1)
        return [a.reshape(-1, Q * C) for a, Q in zip(A, self.counts)]


def copper() -> tuple[facet.Batch, float]:
    """64 atoms, and their mean number of neighbours: about 46."""
    crystal = rattled(ase.build.bulk("Cu", a=3.575) * (4, 4, 4), 0.1)
    neighbours = facet.find_neighbours(crystal, facet.Config(("Cu",)))
    return facet.make_batch([neighbours], 5.0), len(neighbours.dst) / len(crystal)


def layer_jobs(kind: type[facet.Density], batch: facet.Batch, config: facet.Config) -> dict[str, Callable]:
    """One layer L → L alone: splines, harmonics, density, and an energy E = Σ w A²/2 with random weights w.

    Quadratic, because in a network the gradient that comes back to a layer depends on what the layer gave; and the
    gradient at h counts as a force, because it becomes one in the layers before.
    """
    torch.manual_seed(0)
    L, C, B, (N, K) = config.degree, config.channels, config.groups, batch.src.shape
    splines, density = facet.RadialSplines(B * (L + 1), config).float(), kind(L, L, config).float()
    h = torch.randn(N, (L + 1) ** 2, C).requires_grad_()
    weights = [torch.randn(N * (2 * l + 1), Q * C) for l, Q in enumerate(density.counts)]
    index = (batch.src[:, None] * B + torch.arange(B)[:, None]).flatten(0, 1)  # [N B, K]

    def evaluate(training: bool = False) -> list[Tensor]:
        vectors = batch.vectors.detach().requires_grad_()
        r = vectors.norm(dim=-1)
        phi = splines(r).view(N, K, B, L + 1).permute(0, 2, 3, 1).contiguous()  # [N, B, L+1, K]
        Y = facet.harmonics(vectors / r[..., None], L).mT.contiguous()  # [N, M, K]
        energy = sum((w * a * a).sum() for w, a in zip(weights, density(h, index, phi, Y))) / 2
        return [energy, *torch.autograd.grad(energy, (vectors, h), create_graph=training)]

    def train() -> list[Tensor]:
        loss = sum(error.square().sum() for error in evaluate(training=True))
        return list(torch.autograd.grad(loss, (splines.coefficients, h)))
    return dict(zip(JOBS, (evaluate, train)))


def model_jobs(kind: type[facet.Density], batch: facet.Batch, config: facet.Config) -> dict[str, Callable]:
    """Evaluation and training step (without the optimizer) of the whole model, its densities of the given kind."""
    torch.manual_seed(0)
    trained, evaluated = facet.Facet(config), facet.Facet(config).requires_grad_(False)
    evaluated.load_state_dict(trained.state_dict())
    for model in (trained, evaluated):
        each_layer(model, "density", lambda l_in, l_out: kind(l_in, l_out, config).float())

    def evaluate() -> list[Tensor]:
        out = evaluated(batch)
        return [out["energies"], out["forces"]]

    def train() -> list[Tensor]:
        out = trained(batch, training=True)
        loss = (out["energy"] / len(batch.species)).square().mean().float() + out["forces"].square().mean()
        return list(torch.autograd.grad(loss, list(trained.parameters())))
    return dict(zip(JOBS, (evaluate, train)))


def compare(title: str, make: Callable, batch: facet.Batch, config: facet.Config, seconds: float) -> dict:
    """Milliseconds and ratios of the two forms, and their relative difference: the largest of all that is returned."""
    forms = {"density": make(facet.Density, batch, config), "edge-wise": make(EdgeWiseDensity, batch, config)}
    ours, theirs = ([x.detach() for name in JOBS for x in form[name]()] for form in forms.values())
    difference = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))
    ms = in_turn({(name, form): forms[form][name] for name in JOBS for form in forms}, seconds)
    result = {"relative_difference": difference}
    for name in JOBS:
        a, b = ms[name, "density"], ms[name, "edge-wise"]
        result[name] = {"density_ms": a, "edge_wise_ms": b, "ratio": b / a}
        print(f"    {title:20s} {name:14s} density {a:7.1f} ms   edge-wise {b:7.1f} ms   ratio {b / a:5.2f}"
              f"   difference {difference:.0e}")
    return result


# ─── 2 Share of the peak ─────────────────────────────────────────────────────────────────────────────────────────────

def share_of_peak(layer: dict, batch: facet.Batch, config: facet.Config) -> dict:
    """Matrix products of the layer over its whole time, in GFLOP/s, against the best of a large product."""
    (N, K), M, C = batch.src.shape, (config.degree + 1) ** 2, config.channels
    x, rows = torch.randn(2048, 2048), len(facet.Density(config.degree, config.degree, config).G)
    peak = 2 * 2048 ** 3 / min(clock(lambda: x @ x) for _ in range(12)) / 1e6
    # NeighbourSum is N·B products [M, K] × [K, M·C/B]; NeighbourDot and NeighbourSpread are as large. The coupling is N
    # products G [rows, M·M] × D [M·M, C], zeros of G included.
    neighbour, coupling = 2 * N * K * M * M * C, 2 * N * rows * M * M * C
    # Energy: Sum, G. Its gradient: Gᵀ, Dot, Spread. Training, the derivative of all that: of Dot (Sum, Spread), of
    # Spread (Sum, Dot), of Gᵀ (G), of G (Gᵀ), of Sum (Dot, Spread).
    result = {"peak_gflops": peak}
    for name, operations in zip(JOBS, (3 * neighbour + 2 * coupling, 9 * neighbour + 4 * coupling)):
        rate = operations / layer[name]["density_ms"] / 1e6
        result[name] = {"mflop": operations / 1e6, "gflops": rate, "share": rate / peak}
        print(f"    layer, C = {C}, {name}: {operations / 1e6:.0f} Mflop in matrix products, {rate:.1f} GFLOP/s, "
              f"{100 * rate / peak:.1f} % of {peak:.0f}")
    return result


# ─── 3 Many atoms ────────────────────────────────────────────────────────────────────────────────────────────────────

def scaling(sizes: list[int], seconds: float) -> dict:
    """Energy, forces and stress of the default model for cubes of silicon, neighbours given."""
    config = facet.Config(("Si",))
    model, jobs = facet.Facet(config).requires_grad_(False), {}
    for n in sizes:
        batch = facet.make_batch([facet.find_neighbours(silicon(n), config)], config.cutoff)
        jobs[8 * n ** 3] = lambda batch=batch: model(batch)
    small, large = ({N: job for N, job in jobs.items() if (N > 64) == big} for big in (False, True))
    ms = in_turn(small, seconds / 4) | in_turn(large, seconds)  # apart: the small ones need more repeats
    for N, t in ms.items():
        print(f"    {N:6d} atoms {t:10.2f} ms   {t / N:.3f} ms per atom")
    first, last = 512 if max(ms) > 512 else 64, max(ms)
    exponent = log(ms[last] / ms[first]) / log(last / first)
    print(f"    time ~ atoms^{exponent:.3f} from {first} to {last} atoms")
    return {"ms": ms, "exponent": exponent, "from": first, "to": last}


PEAK_MEMORY = """
import resource, sys, density
atoms = density.silicon({n})
atoms.calc = density.facet.FacetCalculator(density.facet.Facet(density.facet.Config(("Si",))), "cpu")
atoms.get_forces()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9)
"""


def peak_memory(n: int) -> float:
    """GB that a fresh process holds at most when the calculator evaluates 8 n³ atoms; Python and PyTorch included."""
    command = [sys.executable, "-c", PEAK_MEMORY.format(n=n)]
    gigabytes = float(subprocess.check_output(command, cwd=Path(__file__).parent))
    print(f"memory: {gigabytes:.2f} GB at most for {8 * n ** 3} silicon atoms through the calculator")
    return gigabytes


# ─── 4 The neighbour list ────────────────────────────────────────────────────────────────────────────────────────────

def neighbour_share(sizes: list[int], seconds: float) -> dict:
    """Share of find_neighbours, and of make_batch, in FacetCalculator.calculate; positions are new every time."""
    config, result, rng, latest = facet.Config(("Si",)), {}, np.random.default_rng(1), []
    calculator = facet.FacetCalculator(facet.Facet(config), "cpu")
    for atoms in map(silicon, sizes):
        def calculate(atoms=atoms):
            atoms.positions += rng.normal(0, 0.01, atoms.positions.shape)
            calculator.calculate(atoms)

        def find(atoms=atoms):
            latest[:] = [facet.find_neighbours(atoms, config)]

        def pad():
            facet.make_batch(latest, config.cutoff)
        total, search, padding = in_turn({"calculate": calculate, "find": find, "pad": pad}, seconds).values()
        result[len(atoms)] = {"calculate_ms": total, "find_neighbours_ms": search, "make_batch_ms": padding,
                              "share": search / total, "make_batch_share": padding / total}
        print(f"    {len(atoms):6d} atoms   calculate {total:8.2f} ms   find_neighbours {search:6.2f} ms, "
              f"{100 * search / total:4.1f} %   make_batch {padding:5.2f} ms, {100 * padding / total:4.1f} %")
    return result


# ─── All of it ───────────────────────────────────────────────────────────────────────────────────────────────────────

def measure(quick: bool, batch: facet.Batch, mean: float) -> dict:
    """Everything but the memory, at the present number of threads."""
    n, seconds = ([1, 2, 4], 0.4) if quick else ([1, 2, 4, 8, 11], 8)
    result, (narrow, wide) = {}, (facet.Config(("Cu",), channels=C, mean_neighbours=mean) for C in (32, 64))
    print("  1 density against edge-wise: L = 2, 8 groups, 64 atoms")
    result["layer"] = compare("layer, C = 64", layer_jobs, batch, wide, seconds)
    for config in (narrow, wide):
        name = f"model, C = {config.channels}"
        result[name] = compare(name, model_jobs, batch, config, seconds)
    print("  2 share of the matrix-product peak")
    result["peak"] = share_of_peak(result["layer"], batch, wide)
    print("  3 the whole default model, silicon")
    result["scaling"] = scaling(n, seconds)
    print("  4 the neighbour list in an evaluation through the calculator")
    result["neighbours"] = neighbour_share(n[:4], seconds / 4)
    return result


def goals(memory: float, runs: list[dict]) -> dict:
    """What was reached, at the worse number of threads, beside what was wanted."""
    worst = [(f"layer, {name}, edge-wise/density", min(run["layer"][name]["ratio"] for run in runs), "at least", goal)
             for name, goal in zip(JOBS, (3.5, 5.0))]
    worst += [("exponent of the number of atoms", max(run["scaling"]["exponent"] for run in runs), "at most", 1.1),
              ("memory, GB", memory, "at most", 8.0),
              ("neighbour list in an evaluation, %",
               max(100 * n["share"] for run in runs for n in run["neighbours"].values()), "at most", 15.0)]
    table = {}
    for name, value, sign, goal in worst:
        reached = value >= goal if sign == "at least" else value <= goal
        table[name] = {"value": value, "goal": f"{sign} {goal}", "reached": reached}
        print(f"    {name:42s} {value:6.2f}   goal: {sign} {goal}, {'reached' if reached else 'MISSED'}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run that writes nothing")
    quick, start, load = parser.parse_args().quick, time.perf_counter(), os.getloadavg()[0]
    batch, mean = copper()
    results = {"load": load, "dtype": "float32", "mean_neighbours": mean,
               "padded_neighbours": batch.src.shape[1],
               "environment": {k: v for k, v in os.environ.items() if k.startswith(("MALLOC_", "OMP_", "MKL_"))}}
    print(f"{hardware()}, load {load:.1f}, torch {torch.__version__}, float32\n"
          f"copper: {len(batch.src)} atoms, {mean:.1f} neighbours on average, padded to {batch.src.shape[1]}")
    results["memory_GB"] = peak_memory(4 if quick else 8)  # first: on Linux a child's ru_maxrss begins at its parent's
    results["threads"] = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        print(f"{threads} thread{'s' * (threads > 1)}")
        results["threads"][threads] = measure(quick, batch, mean)
    print("goals, and the worse of the two thread counts")
    results["goals"] = goals(results["memory_GB"], list(results["threads"].values()))
    results["seconds"] = time.perf_counter() - start
    print(f"{results['seconds']:.0f} s")
    if not quick:
        write_results("density", results)


if __name__ == "__main__":
    main()
