"""How fast Facet is on this machine's processor, in float32.

    python benchmarks/density.py            # 3 minutes on 2 quiet cores
    python benchmarks/density.py --quick    # 20 seconds: few repeats, to 512 atoms; writes nothing
    python benchmarks/density.py --sums     # 1 minute: what facet.NeighbourSum saves against the
                                            # same in a few lines; writes nothing
    python benchmarks/density.py --chunks   # 1 minute: a training step with chunks of other sizes

Prints, at one thread and at two:

    1  the density (facet.py §5) of one layer against the edge-wise form of the same layer: their
       difference, milliseconds and ratio of an evaluation (energy and forces) and of a training
       step;
    2  milliseconds of the whole model from 8 to 10,648 silicon atoms (energy, forces, stress;
       neighbours given), and the exponent of the number of atoms.

What is compared is timed in turn, in one process; numbers are medians. Other programs spoil them,
at two threads most of all: the load is printed and kept. For Linux and macOS. Where fresh memory is
slow to get (virtual machines), the edge-wise form and crystals of 10,000 atoms pay for it. With
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 in front of the command glibc reuses its
memory: compare both. Writes benchmarks/results/density.json.
"""
from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from math import log
from pathlib import Path
from unittest import mock

import ase.build
import torch
from common import (
    command_line,
    environment,
    hardware,
    in_turn,
    peak_GB,
    rattled,
    silicon,
    write_results,
)
from torch import Tensor
from torch.nn.functional import pad

import facet

JOBS = ("energy+forces", "training step")


# ─── 1 Density against edge-wise ─────────────────────────────────────────────────────────────────


class EdgeWiseDensity(facet.Density):
    """The same layer evaluated as it is written, edge by edge: what codes with radial MLPs do.

        A[i,p,m3,c] = Σ_j R_pc(r_ij) Σ_m1 T[ij,p,m3,m1] h[j,l1m1,c]
        T[ij,p,m3,m1] = Σ_m2 G[m1,m2,m3] Y_l2m2(r̂_ij)

    Kept fast: neighbours are padded, so that sums need no index_add; T is made once per edge for
    all paths; one batched product per l1; rows in the order of l1 and l2, so that R is not repeated
    for the m3 and l3 that share it.
    """

    def __init__(self, l_in: int, l_out: int, config: facet.Config):
        super().__init__(l_in, l_out, config)

        # (l1, l2) of each row (l3, m3, path) of G, and the rows in the order of these
        l1l2 = []
        for l3 in range(l_out + 1):
            ending = [path[:2] for path in self.paths if path[2] == l3]
            l1l2 += ending * (2 * l3 + 1)
        order = sorted(range(len(l1l2)), key=lambda row: l1l2[row])

        # for each l1 the number of rows that an l2 has
        self.pairs = []
        for l1 in range(l_in + 1):
            found = {l2: l1l2.count((l1, l2)) for l2 in range(config.degree + 1)}
            self.pairs.append({l2: rows for l2, rows in found.items() if rows})

        blocks = self.G.view(len(order), (l_in + 1) ** 2, -1)[order]  # [rows, m1, m2]
        blocks = blocks.split([sum(pairs.values()) for pairs in self.pairs])
        for l1, G in enumerate(blocks):
            G = G[:, facet.rows_of(l1)].permute(2, 0, 1).flatten(1)  # [m2, rows m1]
            self.register_buffer(f"G{l1}", G)
        self.register_buffer("back", torch.tensor(order).argsort())  # to facet.Density's order

    def forward(self, h: Tensor, index: Tensor, phi: Tensor, Y: Tensor) -> Tensor:
        """As facet.Density."""
        C = h.shape[2]
        N, B, K, _ = phi.shape
        src = index[:, 0].flatten() // B  # [N K]
        radial = phi.permute(3, 0, 2, 1).repeat_interleave(C // B, -1)[..., None, :]
        Y = Y.reshape(N * K, -1)  # [N K, m2]; radial [L+1, N, K, 1, C]

        sums = []
        for l1, pairs in enumerate(self.pairs):
            h_src = h[:, facet.rows_of(l1)].flatten(1).index_select(0, src)  # [N K, m1 C]
            h_src = h_src.view(N * K, -1, C)  # [N K, m1, C]
            T = (Y @ getattr(self, f"G{l1}")).view(N * K, -1, 2 * l1 + 1)  # [N K, rows, m1]
            messages = torch.bmm(T, h_src) if l1 else T * h_src  # [N K, rows, C]
            messages = messages.view(N, K, -1, C).split(list(pairs.values()), 2)
            for l2, message in zip(pairs, messages, strict=True):
                sums.append((message * radial[l2]).sum(1))  # [N, rows of l1 l2, C]

        A = torch.cat(sums, 1).index_select(1, self.back)  # [N, J, C]
        return pad(A, (0, 0, 0, 0, 0, len(h) - N))  # lone atoms get nothing


def copper() -> tuple[facet.Batch, float]:
    """64 atoms, and their mean number of neighbours: about 46."""
    crystal = rattled(ase.build.bulk("Cu", a=3.575) * (4, 4, 4), 0.1)
    neighbours = facet.find_neighbours(crystal, facet.Config(("Cu",)))
    return facet.make_batch([neighbours], 5.0), len(neighbours.dst) / len(crystal)


def layer_jobs(kind: type, batch: facet.Batch, config: facet.Config) -> dict[str, Callable]:
    """One layer L → L alone: splines, harmonics, density, and E = Σ w A²/2 with random weights w.

    Quadratic, because in a network the gradient that comes back to a layer depends on what the
    layer gave; and the gradient at h counts as a force, because it becomes one in the layers
    before.
    """
    torch.manual_seed(0)
    L, C, B = config.degree, config.channels, config.groups
    N, K = batch.src.shape
    splines = facet.RadialSplines(B * (L + 1), config).float()
    density = kind(L, L, config).float()
    h = torch.randn(N, (L + 1) ** 2, C).requires_grad_()
    weights = torch.randn(N, len(density.G), C)
    index = batch.src[:, None] * B + torch.arange(B)[:, None]  # [N, B, K]

    def evaluate(differentiable: bool = False) -> list[Tensor]:
        vectors = batch.vectors.detach().requires_grad_()  # [N, K, 3]
        r = vectors.norm(dim=-1)  # [N, K]
        phi = splines(r).view(N, K, B, L + 1).transpose(1, 2).contiguous()  # [N, B, K, L+1]
        Y = facet.harmonics(vectors / r[..., None], L)  # [N, K, M]
        A = density(h, index, phi, Y)
        energy = (weights * A * A).sum() / 2
        slopes = torch.autograd.grad(energy, (vectors, h), create_graph=differentiable)
        return [energy, *slopes]

    def train() -> list[Tensor]:
        loss = sum(error.square().sum() for error in evaluate(differentiable=True))
        return list(torch.autograd.grad(loss, (splines.coefficients, h)))

    return dict(zip(JOBS, (evaluate, train), strict=True))


def compare(batch: facet.Batch, config: facet.Config, seconds: float) -> dict:
    """Milliseconds and ratios of the two forms, and the largest relative difference of results."""
    forms = {
        "density": layer_jobs(facet.Density, batch, config),
        "edge-wise": layer_jobs(EdgeWiseDensity, batch, config)}
    difference = 0.0
    for name in JOBS:
        pairs = zip(forms["density"][name](), forms["edge-wise"][name](), strict=True)
        for ours, theirs in pairs:
            error = (ours - theirs).norm() / theirs.norm()
            difference = max(difference, float(error.detach()))

    ms = in_turn({(name, form): forms[form][name] for name in JOBS for form in forms}, seconds)
    result = {"relative_difference": difference}
    for name in JOBS:
        ours, theirs = ms[name, "density"], ms[name, "edge-wise"]
        result[name] = {"density_ms": ours, "edge_wise_ms": theirs, "ratio": theirs / ours}
        print(
            f"    {name:14s} density {ours:7.1f} ms   edge-wise {theirs:7.1f} ms   "
            f"ratio {theirs / ours:5.2f}   difference {difference:.0e}")
    return result


# ─── 2 Many atoms ────────────────────────────────────────────────────────────────────────────────


def scaling(sizes: list[int], seconds: float) -> dict:
    """Energy, forces and stress of the default model for cubes of silicon, neighbours given."""
    config = facet.Config(("Si",))
    model = facet.Facet(config).requires_grad_(False)
    small, large = {}, {}  # apart: the small ones need more repeats
    for n in sizes:
        batch = facet.make_batch([facet.find_neighbours(silicon(n), config)], config.cutoff)
        jobs = large if 8 * n**3 > 64 else small
        jobs[8 * n**3] = lambda batch=batch: model(batch)
    ms = in_turn(small, seconds / 4) | in_turn(large, seconds)

    for N, t in ms.items():
        print(f"    {N:6d} atoms {t:10.2f} ms   {t / N:.3f} ms per atom")
    last = max(ms)
    first = 512 if last > 512 else 64
    exponent = log(ms[last] / ms[first]) / log(last / first)
    print(f"    time ~ atoms^{exponent:.3f} from {first} to {last} atoms")
    return {"ms": ms}


# ─── What NeighbourSum saves ─────────────────────────────────────────────────────────────────────


class PlainSum:
    """What facet.NeighbourSum computes, in a few lines; its derivatives are autograd's."""

    @staticmethod
    def apply(phi, Y, h, grad_A, index, G, of_degree):
        N, B, K = index.shape
        w = (phi @ of_degree * Y[:, :, None]).sum(1)  # [N, B, K, M]
        there = h[index.flatten()].view(N * B, K, -1)  # [N B, K, c m1]
        D = torch.bmm(there.mT, w.flatten(0, 1)).view(-1, G.shape[1])  # [N B c, m1 m2]
        A = (G @ D.T).view(len(G), N, -1)  # [J, N, C]
        return [pad(A, (0, 0, 0, len(h) // B - N))]  # [J, N+U, C]


SUMS = {"ours": facet.NeighbourSum, "plain": PlainSum}


def silicon_jobs(n: int, which: str) -> dict[str, Callable]:
    """An evaluation and a training step of the default model on 8 n³ atoms, with one of SUMS."""
    config = facet.Config(("Si",))
    model = facet.Facet(config)
    batch = facet.make_batch([facet.find_neighbours(silicon(n), config)], config.cutoff)

    def evaluation():
        facet.NeighbourSum = SUMS[which]
        model(batch)

    def step():
        facet.NeighbourSum = SUMS[which]
        out = model(batch, differentiable=True)
        model.zero_grad()
        (out["forces"].square().sum() + out["energy"].square().sum()).backward()

    return {"evaluation": evaluation, "training step": step}


def growth_in_steps(n: int, which: str) -> None:
    """Print the MB by which three training steps make this process larger."""
    step = silicon_jobs(n, which)["training step"]
    before = peak_GB()
    for _ in range(3):
        step()
    print(1000 * (peak_GB() - before))


def what_sums_save() -> None:
    """Print memory and milliseconds (CPU time, one thread) of both, for 64 and 512 atoms."""
    torch.set_num_threads(1)
    for n in (2, 4):
        megabytes = {}
        for which in SUMS:
            code = f"import density; density.growth_in_steps({n}, {which!r})"
            found = subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parent)
            megabytes[which] = float(found)
        print(f"{8 * n**3} atoms  memory of a training step {megabytes['ours']:.0f} MB, plain "
              f"{megabytes['plain']:.0f} MB: {megabytes['ours'] / megabytes['plain']:.2f} of it")

        jobs = {which: silicon_jobs(n, which) for which in SUMS}
        for name in jobs["ours"]:
            both = {which: jobs[which][name] for which in SUMS}
            ms = in_turn(both, 6, now=time.process_time)
            print(f"{8 * n**3} atoms  {name} {ms['ours']:.1f} ms, plain {ms['plain']:.1f} ms: "
                  f"{ms['ours'] / ms['plain']:.2f} of it")


def with_chunks(numbers: int, job: Callable) -> None:
    """Run the job with facet.chunks of so many numbers."""
    def chunks(index, X):
        n = max(1, numbers // max(1, index[0].numel() * X))
        return [slice(a, min(a + n, len(index))) for a in range(0, len(index), n)]

    with mock.patch.object(facet, "chunks", chunks):
        job()


def what_chunks_cost() -> None:
    """Print milliseconds of a training step on 512 atoms, for facet.chunks of several sizes."""
    for threads in (1, 2):
        torch.set_num_threads(threads)
        step = silicon_jobs(4, "ours")["training step"]

        jobs = {power: partial(with_chunks, 2 ** power, step) for power in range(15, 25)}
        ms = in_turn(jobs, 6)
        for power, found in ms.items():
            print(f"{threads} threads, chunks of 2^{power} numbers: {found:.1f} ms")


# ─── All of it ───────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run that writes nothing")
    parser.add_argument("--sums", action="store_true", help="what facet.py's sums save; no more")
    parser.add_argument("--chunks", action="store_true", help="what their sizes cost; no more")
    args = parser.parse_args()
    if args.sums:
        what_sums_save()
        return
    if args.chunks:
        what_chunks_cost()
        return
    sizes, seconds = ([1, 2, 4], 0.4) if args.quick else ([1, 2, 4, 8, 11], 8)
    start = time.perf_counter()
    load = os.getloadavg()[0]
    batch, mean = copper()
    results = {
        "load": load, "dtype": "float32", "mean_neighbours": mean, "environment": environment(),
        "threads": {}}
    print(
        f"{hardware()}, load {load:.1f}, torch {torch.__version__}, float32\n"
        f"copper: {len(batch.src)} atoms, {mean:.1f} neighbours on average, padded to "
        f"{batch.src.shape[1]}")

    for threads in (1, 2):
        torch.set_num_threads(threads)
        print(f"{threads} thread{'s' * (threads > 1)}")
        config = facet.Config(("Cu",), channels=64, mean_neighbours=mean)
        print("  1 density against edge-wise: one layer, C = 64, L = 2, 8 groups, 64 atoms")
        layer = compare(batch, config, seconds)
        print("  2 the whole default model, silicon")
        results["threads"][threads] = {"layer": layer, "scaling": scaling(sizes, seconds)}

    results["seconds"] = time.perf_counter() - start
    print(f"{results['seconds']:.0f} s")
    if not args.quick:
        write_results("density", results)


if __name__ == "__main__":
    main()
