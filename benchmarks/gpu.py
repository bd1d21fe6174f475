"""Facet on a GPU: does it repeat, where does it wait, how much fits, what do chunks and graphs do?

    python benchmarks/gpu.py                        # all of it, 4 minutes on an H100
    python benchmarks/gpu.py --only repeats waits   # some of it
    python benchmarks/gpu.py --quick                # small and short; writes nothing

All in float32, with the default model, on silicon and, for `repeats`, on the embedded set:

    repeats   the same batch twice, the same training twice: how far apart; and what
              torch.use_deterministic_algorithms(True) changes and costs
    waits     how often the CPU waits for the GPU in a step of train_small.py, and where
    idle      how many kernels a call and a training step launch, and how long the GPU is busy with
              them: the rest is the CPU's
    sizes     milliseconds of a call and of a training step, 8 to 110,592 atoms; the memory of both;
              how many atoms fit
    chunks    milliseconds and memory of a call and of a training step for other sizes of
              facet.chunks
    graphs    a call and a training step as they are and replayed (tools/replay.py), the call bare
              and through the ASE calculator

Times are medians, what is compared takes turns, and the clock stops when the GPU is done. Writes
benchmarks/results/gpu.json. --device cpu runs what can be run without a GPU, to try the script.
"""
from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache, partial
from pathlib import Path
from unittest import mock

# What deterministic products need, said before CUDA begins
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch
from common import command_line, in_turn, read_results, silicon, write_results
from density import with_chunks
from torch.profiler import ProfilerActivity, profile

import facet
import train_small
from tools.frames import Frames, load_sets
from tools.labels import TABLE
from tools.replay import Replayed, ReplayedGradient
from tools.statistics import statistics

CONFIG = facet.Config(("Si",), mean_neighbours=28.0)


# ─── What is measured ────────────────────────────────────────────────────────────────────────────


def finish(device: str) -> None:
    """Wait until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_MB(device: str, job: Callable) -> float:
    """What a run of the job holds at most above what there was before it."""
    if device != "cuda":
        return float("nan")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    job()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def crystal(n: int, device: str) -> facet.Batch:
    """8 n³ atoms of silicon."""
    neighbours = facet.find_neighbours(silicon(n), CONFIG)
    return facet.make_batch([neighbours], CONFIG.cutoff).to(device)


def model_on(device: str) -> facet.Facet:
    torch.manual_seed(0)
    return facet.Facet(CONFIG).to(device)


def call_of(model: torch.nn.Module, batch: facet.Batch, device: str) -> Callable:
    """Energy, forces and stress."""
    def call():
        model(batch)
        finish(device)
    return call


def step_of(model: facet.Facet, batch: facet.Batch, device: str, replay: bool = False) -> Callable:
    """A step of train_small.py on a batch that is there, replayed as it does it or not."""
    settings = train_small.Settings(lr=1e-6, muon_lr=1e-6)
    optimisers = train_small.optimizers(model, settings, steps=1000)
    trained = list(model.parameters())
    target = {"atoms": batch.crystal.bincount()}  # [S]
    with torch.no_grad():
        out = model(batch)
    for label in TABLE:
        target[label.output] = torch.zeros_like(out[label.output])
    target["count"] = torch.tensor([target[label.output].numel() for label in TABLE], device=device)
    target["weights"] = torch.ones(len(TABLE), device=device)

    find_gradient = partial(train_small.gradient_of, model, scale=1.0, huber=settings.huber)
    if replay:
        find_gradient = ReplayedGradient(find_gradient, model)

    def step():
        find_gradient(batch, target)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimisers:
            optimizer.step()
        finish(device)
    return step


@cache
def embedded() -> tuple[Frames, facet.Config]:
    """The embedded set to train on, and what a model must know of it."""
    settings = train_small.Settings()
    with tempfile.TemporaryDirectory() as folder:
        frames, _, _ = load_sets(settings, folder, None)
    return frames, statistics(frames, settings)[0]


def embedded_training(device: str, steps: int) -> torch.Tensor:
    """All weights after so many steps of train_small.py on the embedded set."""
    frames, config = embedded()
    torch.manual_seed(0)
    model = facet.Facet(config).to(device)
    settings = train_small.Settings(steps=steps, device=device)
    with redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        trained, _ = train_small.train(model, frames, frames.take([]), settings, Path(folder))
    return torch.cat([weights.flatten() for weights in trained.parameters()]).cpu()


# ─── The parts ───────────────────────────────────────────────────────────────────────────────────


def repeats(device: str, quick: bool) -> dict:
    batch = crystal(2 if quick else 4, device)
    model = model_on(device)
    steps = 20 if quick else 200
    result = {"steps": steps}
    for name, deterministic in (("as it is", False), ("deterministic", True)):
        torch.use_deterministic_algorithms(deterministic)
        found = [model(batch) for _ in range(5)]
        spread = {}
        for key in ("energy", "forces", "stress"):
            values = torch.stack([out[key] for out in found]).double()
            distance = (values - values[0]).abs().max() / values[0].square().mean().sqrt()
            spread[key] = float(distance)
        weights = embedded_training(device, steps)
        again = embedded_training(device, steps)
        weights_apart = float((weights - again).norm() / weights.norm())
        print(f"  {name}: five calls lie within {spread['energy']:.0e} (energy), "
              f"{spread['forces']:.0e} (forces), {spread['stress']:.0e} (stress) of each other; "
              f"weights after {steps} steps, twice: {weights_apart:.0e}")
        result[name] = {"calls": spread, "weights": weights_apart}

    # What it costs
    jobs = {}
    for deterministic in (False, True):
        for kind, make in (("call", call_of), ("step", step_of)):
            job = make(model_on(device), batch, device)

            def run(job=job, deterministic=deterministic):
                torch.use_deterministic_algorithms(deterministic)
                job()

            jobs[kind, deterministic] = run
    ms = in_turn(jobs, 1 if quick else 4)
    torch.use_deterministic_algorithms(False)
    for kind in ("call", "step"):
        ratio = ms[kind, True] / ms[kind, False]
        print(f"  deterministic: a {kind} on {len(batch.src)} atoms takes {ratio:.2f} of the time")
        result[f"{kind}, time with over without"] = ratio
    return result


def waits(device: str, quick: bool) -> dict:
    """The difference of two trainings, so that begin and end do not count."""
    places = []
    for steps in (20, 60):
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # Lines of the log are tests, and wait; a long run has one in twenty steps
            with mock.patch.object(train_small.Progress, "stepped", stepped_without_log):
                embedded_training(device, steps)
        torch.cuda.set_sync_debug_mode("default")
        found = [w for w in caught if "synchronizing" in str(w.message)]
        places.append(Counter(f"{Path(w.filename).name}:{w.lineno}" for w in found))
    more = places[1] - places[0]
    per_step = {place: count / 40 for place, count in more.items()}
    print(f"  {sum(per_step.values()):.2f} waits a step: {per_step}")
    return per_step


def stepped_without_log(p, structures: int, seconds: float) -> bool:
    p.step += 1
    p.share = p.share_at(seconds)
    return False


def idle(device: str, quick: bool) -> dict:
    result = {}
    for n in (2, 4) if quick else (1, 2, 4, 8, 16):
        batch = crystal(n, device)
        for kind, make in (("call", call_of), ("step", step_of)):
            job = make(model_on(device), batch, device)
            ms = in_turn({kind: job}, 0.5 if quick else 2)[kind]
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
                for _ in range(5):
                    job()
            kernels = [e for e in profiled.events()
                       if e.device_type.name == "CUDA" and not e.is_user_annotation]
            busy = sum(e.device_time for e in kernels) / 5 / 1000  # ms
            atoms = len(batch.src)
            print(f"  {kind} on {atoms} atoms: {len(kernels) // 5} kernels, {ms:.2f} ms, of which "
                  f"the GPU is busy {100 * busy / ms:.0f} %")
            result[f"{kind}, {atoms} atoms"] = {
                "kernels": len(kernels) // 5, "ms": ms, "busy_ms": busy}
    return result


def sizes(device: str, quick: bool) -> dict:
    result = {}
    for n in (1, 2, 4) if quick else (1, 2, 4, 8, 16, 24):
        batch = crystal(n, device)
        atoms = len(batch.src)
        row = {}
        for kind, make in (("call", call_of), ("step", step_of)):
            job = make(model_on(device), batch, device)
            row[f"{kind}_ms"] = in_turn({kind: job}, 0.5 if quick else 2)[kind]
            row[f"{kind}_MB"] = peak_MB(device, job)
        print(f"  {atoms:6d} atoms: a call {row['call_ms']:8.2f} ms, {row['call_MB']:8.0f} MB; "
              f"a training step {row['step_ms']:8.2f} ms, {row['step_MB']:8.0f} MB")
        result[atoms] = row
    if device == "cuda" and not quick:
        result["largest"] = largest(device)
    return result


def largest(device: str) -> dict:
    """How many atoms fit: copies of a crystal of 4,096 atoms in one batch need what one crystal of
    as many atoms needs."""
    one = crystal(8, "cpu")
    atoms, K = one.src.shape

    def copies(m: int) -> facet.Batch:
        first = (torch.arange(m, device=device) * atoms)[:, None, None]  # [m, 1, 1]
        return facet.Batch(
            species=one.species.to(device).repeat(m),
            src=(one.src.to(device) + first).view(m * atoms, K),
            vectors=one.vectors.to(device).repeat(m, 1, 1),
            crystal=torch.arange(m, device=device).repeat_interleave(atoms),
            volume=one.volume.to(device).repeat(m),
            present=one.present.to(device))

    result = {}
    for kind, make in (("call", call_of), ("step", step_of)):
        fits, fails = 1, 2 ** 20
        while fails > 1.05 * fits + 1:
            # Doubled until it fails, then halfway between
            m = 2 * fits if fails == 2 ** 20 else (fits + fails) // 2
            torch.cuda.empty_cache()
            try:
                make(model_on(device), copies(m), device)()
                fits = m
            except torch.OutOfMemoryError:
                fails = m
        result[kind] = fits * atoms
        print(f"  the largest {kind} that fits: {fits * atoms:,} atoms")
    result["memory_GB"] = torch.cuda.get_device_properties(0).total_memory / 1e9
    return result


def chunks(device: str, quick: bool) -> dict:
    result = {}
    for n in (2,) if quick else (4, 8, 16):
        batch = crystal(n, device)
        atoms = len(batch.src)
        for kind, make in (("call", call_of), ("step", step_of)):
            job = make(model_on(device), batch, device)

            powers = range(20, 31, 2)
            runs = {power: partial(with_chunks, 2 ** power, job) for power in powers}
            ms = in_turn(runs, 0.5 if quick else 4)
            MB = {power: peak_MB(device, runs[power]) for power in powers}
            print(f"  {kind} on {atoms} atoms: " + ", ".join(
                f"2^{power} {ms[power]:.2f} ms {MB[power]:.0f} MB" for power in powers))
            result[f"{kind}, {atoms} atoms"] = {
                "power": list(powers), "ms": list(ms.values()), "MB": list(MB.values())}
    return result


def through_ase(model: facet.Facet, n: int, device: str, replay: bool) -> Callable:
    """A call of the ASE calculator at positions that are new every time."""
    calculator = facet.FacetCalculator(model, device)
    if replay:
        calculator.model = Replayed(calculator.model)
    atoms = silicon(n)
    home = atoms.positions.copy()
    rng = np.random.default_rng(0)

    def calculate():
        atoms.positions = home + rng.normal(0, 0.01, home.shape)
        calculator.calculate(atoms)
    return calculate


def graphs(device: str, quick: bool) -> dict:
    result = {}
    for n in (1, 2, 4) if quick else (1, 2, 3, 4, 6, 8):
        atoms = silicon(n)
        batch = crystal(n, device)
        model = model_on(device).eval()
        replayed = Replayed(model)

        # The same numbers, also of another crystal after it
        apart = {"energies": 0.0, "forces": 0.0, "stress": 0.0}
        for other in (batch, batch._replace(vectors=1.01 * batch.vectors), batch):
            wanted, found = model(other), replayed(other)
            for name in apart:
                size = wanted[name].square().mean().sqrt()
                error = float((found[name] - wanted[name]).abs().max() / size)
                apart[name] = max(apart[name], error)

        ms = in_turn({
            "bare": call_of(model, batch, device),
            "bare, replayed": call_of(replayed, batch, device),
            "step": step_of(model_on(device), batch, device),
            "step, replayed": step_of(model_on(device), batch, device, replay=True),
            "calculator": through_ase(model, n, device, replay=False),
            "calculator, replayed": through_ase(model, n, device, replay=True),
            "neighbours": partial(facet.find_neighbours, atoms, CONFIG),
        }, 0.5 if quick else 2)
        print(f"  {len(atoms):5d} atoms: bare {ms['bare']:.2f} → {ms['bare, replayed']:.2f} ms, "
              f"{ms['bare'] / ms['bare, replayed']:.1f} ×; training step {ms['step']:.1f} → "
              f"{ms['step, replayed']:.1f} ms; through ASE {ms['calculator']:.2f} → "
              f"{ms['calculator, replayed']:.2f} ms, of which {ms['neighbours']:.2f} for the "
              f"neighbours; forces apart by {apart['forces']:.0e} of their size")
        result[len(atoms)] = {"ms": ms, "apart": apart}
    return result


PARTS = {part.__name__: part for part in (repeats, waits, idle, sizes, chunks, graphs)}
ON_CPU = ("repeats", "sizes", "chunks")


def parse() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=", ".join(PARTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small and short; writes nothing")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --quick tries the script")
    return args


def main() -> None:
    args = parse()
    begin = time.perf_counter()
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}, float32", flush=True)
    kept = read_results("gpu")
    content = {**kept, "device": card, "dtype": "float32"}
    failed = []
    for name in args.only:
        if args.device == "cpu" and name not in ON_CPU:
            print(f"{name}: needs a GPU")
            continue
        print(f"{name}, after {time.perf_counter() - begin:.0f} s", flush=True)
        try:
            content[name] = PARTS[name](args.device, args.quick)
        except RuntimeError:  # of CUDA: the other parts do not need this one
            traceback.print_exc()
            failed.append(name)
            continue
        if not args.quick:
            write_results("gpu", content)  # after each part, so that a stop loses little
            content["made"] = read_results("gpu")["made"]
    print(f"{time.perf_counter() - begin:.0f} s")
    if failed:
        sys.exit(f"error: {' '.join(failed)} failed")


if __name__ == "__main__":
    main()
