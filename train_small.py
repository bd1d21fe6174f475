"""Train a small Facet, test it, draw what it learned.

    python train_small.py                                   # embedded data (EMT metals), 2 to 3 minutes on 2 CPU cores
    python train_small.py --train si_train.extxyz --test si_test.extxyz --name si          # 10 minutes on 2 CPU cores
    python train_small.py --train "crystals*.json.gz" --minutes 600 --channels 64          # whatever time you have

Reads what ASE reads (extxyz, traj, db, OUTCAR, vasprun.xml, …, .gz, globs) with energy (eV), forces (eV/Å) and, if there,
stress (eV/Å³), and JSON in the layout of MPtrj. Writes to runs/<name>/: model.pt, metrics.csv, result.json, parity.png,
splines.png. `--minutes` is a budget: the learning rate follows the clock and is down to zero when it is spent;
`--steps` counts steps instead, for runs that can be repeated exactly.
"""
from __future__ import annotations

import argparse
import copy
import csv
import glob
import gzip
import json
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.emt import EMT
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from ase.stress import voigt_6_to_full_3x3_stress
from torch.nn.functional import smooth_l1_loss

import facet

KBAR = -0.1 * units.GPa  # VASP writes the pressure on the cell, in kbar; ASE the tension, in eV/Å³


def setting(default, text):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """Every hyperparameter, and what the command line shows of it."""
    train: tuple[str, ...] = setting((), "files or globs to train on; none: an embedded set of EMT metals")
    test: tuple[str, ...] = setting((), "files or globs to test on; none: a tenth of the training materials, set aside")
    name: str = setting("", "results go to runs/NAME; by default the name of the training file, and never over old results")
    minutes: float = setting(0.0, "training time; 0: 9.5, or 1.75 for the embedded set")
    steps: int = setting(0, "number of steps, instead of minutes")
    seed: int = setting(0, "of the weights, the order of the data and the split")
    device: str = setting("", "cpu, cuda, cuda:1, …; by default cuda if there is one")
    threads: int = setting(0, "CPU threads; 0: as PyTorch chooses")
    cutoff: float = setting(5.0, "Å, how far an atom sees in one layer")
    degree: int = setting(2, "L, highest degree of the features")
    channels: int = setting(32, "C, copies of every feature")
    groups: int = setting(8, "B, groups of channels with radial functions of their own")
    layers: int = setting(3, "T, number of message-passing layers")
    splines: int = setting(24, "R, B-splines per radial function")
    activation: str = setting("product", "of the grid layer: product or silu")
    batch_atoms: int = setting(0, "atoms per step; 0: ten structures of mean size, at most 256")
    lr: float = setting(5e-3, "highest learning rate of AdamW; warm-up, then a cosine to zero")
    weight_decay: float = setting(1e-3, "of AdamW")
    muon_lr: float = setting(1e-2, "highest learning rate of Muon, which trains the matrices that mix paths")
    muon_decay: float = setting(0.1, "weight decay of Muon")
    clip: float = setting(1.0, "longest gradient allowed")
    ema: float = setting(0.99, "averaging of the weights; the averaged ones are tested and saved")
    energy_start: float = setting(0.05, "weight of the energy loss at first …")
    energy_end: float = setting(0.3, "… and in the end; forces have weight 1")
    stress_weight: float = setting(0.1, "weight of the stress loss; 0: stress labels are not even read")
    huber: float = setting(0.1, "errors beyond this fraction of the force RMS count linearly")


class BadInput(ValueError):
    """Input that cannot be used; the message names file, frame and cure."""


# ─── Data ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclass
class Frame:
    """One labelled structure."""
    atoms: Atoms
    energy: float                       # eV
    forces: np.ndarray                  # [N, 3] eV/Å
    stress: np.ndarray                  # [3, 3] eV/Å³; nan where there is none
    name: str                           # file and frame, for messages
    material: str                       # frames of one material stay on one side of a split
    graph: facet.Neighbours | None = None


def read(patterns: tuple[str, ...], with_stress: bool) -> list[Frame]:
    """All frames of files and globs, checked. Raises BadInput."""
    frames = []
    for pattern in patterns:
        paths = sorted(glob.glob(pattern))
        if not paths:
            raise BadInput(f"{pattern}: no such file")
        for path in paths:
            reader = read_json if path.removesuffix(".gz").endswith(".json") else read_ase
            try:
                found = [check(frame, with_stress) for frame in reader(path)]
            except BadInput:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise BadInput(f"{path}: cannot be read, is it complete and in a format that ASE knows? ({reason})") from error
            if not found:
                raise BadInput(f"{path}: holds no structures")
            frames += found
    return frames


def read_ase(path: str):
    """Frames of any file that ASE reads; consecutive frames of one formula count as one material."""
    run, formula = 0, None
    for i, atoms in enumerate(ase.io.iread(path, index=":")):
        results = atoms.calc.results if atoms.calc else {}
        name = f"{path}, frame {i}"
        for label in ("energy", "forces"):
            if label not in results:
                raise BadInput(f"{name}: has no {label}; a frame needs energy and forces under the names that ASE gives them")
        stress = voigt_6_to_full_3x3_stress(results["stress"]) if "stress" in results else np.full((3, 3), np.nan)
        run, formula = run + (str(atoms.symbols) != formula), str(atoms.symbols)
        atoms.calc = None
        yield Frame(atoms, float(results["energy"]), np.array(results["forces"]), stress, name, f"{path} {run}")


def read_json(path: str):
    """Frames of {material: {frame: {structure, corrected_total_energy, force, stress}}}, the layout of MPtrj."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt") as file:
        data = json.load(file)
    for material, frames in data.items():
        for key, frame in frames.items():
            name = f"{path}, frame {key}"
            missing = [k for k in ("structure", "corrected_total_energy", "force") if frame.get(k) is None]
            if missing:
                raise BadInput(f"{name}: has no {missing[0]}")
            sites = frame["structure"]["sites"]
            atoms = Atoms([site["species"][0]["element"] for site in sites], [site["xyz"] for site in sites],
                          cell=frame["structure"]["lattice"]["matrix"], pbc=True)
            stress = np.full((3, 3), np.nan) if frame.get("stress") is None else np.array(frame["stress"]) * KBAR
            yield Frame(atoms, float(frame["corrected_total_energy"]), np.array(frame["force"]), stress, name, material)


def check(frame: Frame, with_stress: bool) -> Frame:
    """The frame, if its numbers can be trained on. Raises BadInput."""
    if len(frame.atoms) == 0:
        raise BadInput(f"{frame.name}: has no atoms")
    if not with_stress:
        frame.stress = np.full((3, 3), np.nan)
    for label, value in (("an energy", frame.energy), ("a force", frame.forces), ("a position", frame.atoms.positions)):
        if not np.isfinite(value).all():
            raise BadInput(f"{frame.name}: {label} is NaN or infinite; remove the frame or compute it again")
    if frame.forces.shape != (len(frame.atoms), 3):
        raise BadInput(f"{frame.name}: {len(frame.atoms)} atoms, but forces of shape {frame.forces.shape}")
    if np.isnan(frame.stress).any() and not np.isnan(frame.stress).all() or np.isinf(frame.stress).any():
        raise BadInput(f"{frame.name}: a component of the stress is NaN or infinite; remove the frame or compute it again")
    if np.abs(frame.stress).max() > 1:
        raise BadInput(f"{frame.name}: a stress of {np.abs(frame.stress).max():.0f} eV/Å³ looks like kbar; multiply VASP's "
                       f"kbar by {KBAR:.4e} to get ASE's eV/Å³, or leave stress out with --stress_weight 0")
    return frame


def split(frames: list[Frame], seed: int) -> tuple[list[Frame], list[Frame]]:
    """A tenth of the materials (of the frames, if there is one material only) is set aside for testing."""
    key = [frame.material for frame in frames]
    if len(set(key)) < 10:
        key = [frame.name for frame in frames]
    names = np.random.default_rng(seed).permutation(sorted(set(key)))
    held = set(names[:max(1, len(names) // 10)])
    train = [frame for frame, k in zip(frames, key) if k not in held]
    if not train:
        raise BadInput(f"{frames[0].name}: one structure cannot be split in training and test; give more, or --test")
    return train, [frame for frame, k in zip(frames, key) if k in held]


# ─── The embedded set: EMT metals ──────────────────────────────────────────────────────────────────────────────────────

METALS = {"Al": 4.05, "Ni": 3.52, "Cu": 3.61, "Pd": 3.89, "Ag": 4.09, "Pt": 3.92, "Au": 4.08}  # fcc lattice constants, Å
HELD_OUT = "Cu3Au"  # no crystal of this composition is in the set: it is relaxed in the end


def random_crystal(rng: np.random.Generator) -> Atoms:
    """One of the metals or a random alloy of two: strained, rattled, at times with a vacancy or a surface."""
    metals = rng.choice(list(METALS), rng.integers(1, 3), replace=False)
    structure = rng.choice(["fcc", "fcc", "bcc", "hcp"])
    volume = np.mean([METALS[m] ** 3 / 4 for m in metals])  # Å³ per atom
    a = (volume * {"fcc": 4, "bcc": 2, "hcp": np.sqrt(2)}[structure]) ** (1 / 3)
    shape, repeat = ({"covera": np.sqrt(8 / 3)}, (2, 2, 1)) if structure == "hcp" else ({"cubic": True}, (2, 1, 1))
    atoms = ase.build.bulk("Cu", structure, a=a, **shape) * (repeat if structure != "bcc" else (2, 2, 1))
    atoms.symbols = rng.choice(metals, len(atoms))
    if rng.random() < 0.15:
        del atoms[rng.integers(len(atoms))]
    if rng.random() < 0.15:
        atoms.center(vacuum=rng.uniform(2, 5), axis=2)
    strain = rng.normal(0, 0.015, (3, 3)) + rng.normal(0, 0.025) * np.eye(3)
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
    atoms.positions += rng.normal(0, rng.choice([0.02, 0.08, 0.15]), (len(atoms), 3))
    return atoms


def embedded_set(out: Path, count: int = 1000) -> list[Frame]:
    """Random crystals labelled by ASE's EMT calculator, made once and kept in runs/emt.extxyz."""
    path = out / "emt.extxyz"
    if not path.exists():
        print(f"making {count} random crystals of {' '.join(METALS)}, labelled by EMT → {path}")
        rng, images = np.random.default_rng(0), []
        while len(images) < count:
            atoms = random_crystal(rng)
            if atoms.symbols.formula.reduce()[0].format("hill") == Atoms(HELD_OUT).symbols.formula.format("hill"):
                continue
            atoms.calc = EMT()
            if np.abs(atoms.get_forces()).max() < 5 and np.isfinite(atoms.get_stress()).all():
                images.append(atoms)
        part = out / "emt.part.extxyz"
        ase.io.write(part, images)
        os.replace(part, path)
    return read((str(path),), True)


# ─── From data to model ────────────────────────────────────────────────────────────────────────────────────────────────

def reference_energies(frames: list[Frame], species: tuple[str, ...]) -> np.ndarray:
    """E0 per species, eV, by least squares: the part of the energy that composition alone explains."""
    counts = np.array([[np.sum(np.array(frame.atoms.symbols) == s) for s in species] for frame in frames])  # [frames, Z]
    E0, _, rank, _ = np.linalg.lstsq(counts, [frame.energy for frame in frames], rcond=None)
    if rank < len(species):
        print(f"note: these compositions determine only {rank} of {len(species)} reference energies; the smallest are taken")
    return E0


def configure(train: list[Frame], test: list[Frame], s: Settings) -> facet.Config:
    """Config with the statistics of the training set, and every frame's neighbours. Raises BadInput."""
    species = tuple(sorted({symbol for frame in train for symbol in frame.atoms.symbols}))
    scale = float(np.sqrt(np.mean(np.concatenate([frame.forces.ravel() for frame in train]) ** 2))) or 1.0
    config = facet.Config(species, s.cutoff, s.degree, s.channels, s.layers, s.groups, s.splines, activation=s.activation,
                          energy_scale=scale, reference_energies=tuple(reference_energies(train, species).tolist()))
    for frame in train + test:
        try:
            frame.graph = facet.find_neighbours(frame.atoms, config)
        except ValueError as error:
            raise BadInput(f"{frame.name}: {error}") from None
    atoms, edges = sum(len(frame.atoms) for frame in train), sum(len(frame.graph.dst) for frame in train)
    if not edges:
        raise BadInput(f"no atom of the training set has a neighbour within {s.cutoff} Å: are positions in Å? Or raise --cutoff")
    shortest = min(np.linalg.norm(frame.graph.vectors, axis=1).min() for frame in train if len(frame.graph.dst))
    return replace(config, mean_neighbours=max(1.0, edges / atoms), first_knot=0.9 * min(shortest, s.cutoff / 2))


def labels(frames: list[Frame], device, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """energy [S], forces [N, 3], stress [S, 3, 3], atoms [S] of a batch."""
    return {"energy": torch.tensor([frame.energy for frame in frames], dtype=torch.float64, device=device),
            "forces": torch.from_numpy(np.concatenate([frame.forces for frame in frames])).to(device, dtype),
            "stress": torch.from_numpy(np.stack([frame.stress for frame in frames])).to(device, dtype),
            "atoms": torch.tensor([len(frame.atoms) for frame in frames], device=device)}


def ten_structures(frames: list[Frame]) -> int:
    """Atoms in a batch of ten structures of mean size, at most 256."""
    return min(256, 10 * sum(len(frame.atoms) for frame in frames) // len(frames))


def batches(frames: list[Frame], atoms: int, rng: np.random.Generator | None):
    """Lists of frames of about `atoms` atoms together; endless and shuffled with an rng, once and in order without."""
    batch, size = [], 0
    while True:
        for i in rng.permutation(len(frames)) if rng else range(len(frames)):
            batch.append(frames[i])
            size += len(frames[i].atoms)
            if size >= atoms:
                yield batch
                batch, size = [], 0
        if not rng:
            if batch:
                yield batch
            return


def losses(model: facet.Facet, frames: list[Frame], huber: float, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Huber losses of energy per atom, forces and virial per atom, all in units of the force scale."""
    batch = facet.make_batch([frame.graph for frame in frames], model.config.cutoff).to(device)
    target, out, scale = labels(frames, device), model(batch, training=True), model.config.energy_scale
    energy = (out["energy"] - target["energy"]) / target["atoms"] / scale  # [S]
    forces = (out["forces"] - target["forces"]) / scale  # [N, 3]
    virial = target["stress"] * batch.volume.float()[:, None, None]  # [S, 3, 3] eV, nan without a label or a volume
    virial = ((out["virial"] - virial) / target["atoms"][:, None, None] / scale)[torch.isfinite(virial)]  # [≤ 9 S]
    def loss(error, beta):
        return smooth_l1_loss(error, torch.zeros_like(error), beta=beta) if len(error) else error.sum()
    return loss(energy, huber / 10).float(), loss(forces, huber), loss(virial, huber)


def predict(model: facet.Facet, frames: list[Frame], atoms: int, device) -> list[dict[str, np.ndarray]]:
    """Energy, forces and stress of every frame, in order."""
    out = []
    for part in batches(frames, atoms, None):
        result = model(facet.make_batch([frame.graph for frame in part], model.config.cutoff).to(device))
        forces = result["forces"].cpu().split([len(frame.atoms) for frame in part])
        out += [{"energy": float(e), "forces": f.numpy(), "stress": s.numpy()}
                for e, f, s in zip(result["energy"].cpu(), forces, result["stress"].cpu())]
    return out


def errors(predictions: list[dict], frames: list[Frame]) -> dict[str, float]:
    """MAE and RMSE of energy (meV/atom), forces (eV/Å, over components) and stress (GPa; None without labels)."""
    energy = np.array([1000 * (p["energy"] - f.energy) / len(f.atoms) for p, f in zip(predictions, frames)])
    forces = np.concatenate([(p["forces"] - f.forces).ravel() for p, f in zip(predictions, frames)])
    stress = np.concatenate([(p["stress"] - f.stress).ravel() / units.GPa for p, f in zip(predictions, frames)])
    stress = stress[np.isfinite(stress)]
    table = {}
    for name, error in (("energy_{}_meV_per_atom", energy), ("force_{}_eV_per_A", forces), ("stress_{}_GPa", stress)):
        table[name.format("mae")] = float(np.abs(error).mean()) if len(error) else None
        table[name.format("rmse")] = float(np.sqrt((error ** 2).mean())) if len(error) else None
    return table


# ─── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────────

class Log:
    """One line per interval on the screen and in metrics.csv, with the weights in model.pt at the same moments."""
    columns = ("step seconds loss loss_energy loss_forces loss_stress energy_mae_meV_per_atom force_mae_meV_per_A "
               "stress_mae_GPa lr gradient structures_per_s").split()

    def __init__(self, folder: Path, test: list[Frame]):
        self.folder = folder
        self.watched = [test[i] for i in np.random.default_rng(0).permutation(len(test))[:50]]
        self.file = open(folder / "metrics.csv", "w", newline="", buffering=1)  # a line is written when it ends
        self.table = csv.writer(self.file)
        self.table.writerow(self.columns)
        print("   step    loss  (energy  forces  stress)   energy MAE   force MAE   stress MAE        lr  structures/s    left")

    def line(self, model: facet.Facet, step: int, seconds: float, left: float, losses: list, lr: float, gradient: float, rate: float):
        e = errors(predict(model, self.watched, 256, next(model.parameters()).device), self.watched)
        mae = [e["energy_mae_meV_per_atom"], 1000 * e["force_mae_eV_per_A"], e["stress_mae_GPa"] or np.nan]
        total, energy, forces, stress = losses
        print(f"{step:7d} {total:7.4f} ({energy:7.5f} {forces:7.4f} {stress:7.4f}) {mae[0]:8.2f} meV {mae[1]:7.1f} meV/Å "
              f"{mae[2]:8.3f} GPa {lr:9.1e} {rate:13.1f} {left:6.0f} s", flush=True)
        self.table.writerow([step, f"{seconds:.1f}", *losses, *mae, lr, gradient, rate])
        facet.save(model, self.folder / "model.pt")


def train_model(model: facet.Facet, train: list[Frame], test: list[Frame], s: Settings, folder: Path) -> tuple[facet.Facet, dict]:
    """Trains; returns the model with averaged weights, and seconds and steps. Saves model.pt and metrics.csv as it goes."""
    device, rng = next(model.parameters()).device, np.random.default_rng(s.seed)
    averaged = copy.deepcopy(model).requires_grad_(False)
    matrices = [p for name, p in model.named_parameters() if ".mix.W" in name]  # Muon turns their steps into rotations
    others = [p for name, p in model.named_parameters() if ".mix.W" not in name]
    optimizers = [torch.optim.AdamW(others, lr=s.lr, weight_decay=s.weight_decay),
                  torch.optim.Muon(matrices, lr=s.muon_lr, weight_decay=s.muon_decay)]
    log, stream, start = Log(folder, test), batches(train, s.batch_atoms, rng), time.perf_counter()
    step, seen, shown, progress, pause = 0, 0, 0, 0.0, 0.0
    while progress < 1:
        schedule = min(1, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * progress))  # warm-up, then a cosine
        for optimizer, highest in zip(optimizers, (s.lr, s.muon_lr)):
            optimizer.param_groups[0]["lr"] = highest * schedule
        frames = next(stream)
        parts = losses(model, frames, s.huber, device)
        weight = s.energy_start * (s.energy_end / s.energy_start) ** progress
        total = weight * parts[0] + parts[1] + s.stress_weight * parts[2]
        if not torch.isfinite(total):
            raise BadInput(f"the loss became {total.item()} at step {step}, on {', '.join(f.name for f in frames)}; "
                           "look at these frames, or lower --lr")
        model.zero_grad()
        total.backward()
        gradient = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        for optimizer in optimizers:
            optimizer.step()
        step, seen = step + 1, seen + len(frames)
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - min(s.ema, step / (step + 9)))
        elapsed = time.perf_counter() - start
        progress = min(1.0, step / s.steps if s.steps else elapsed / (60 * s.minutes))
        if int(20 * progress) > shown:
            shown = int(20 * progress)
            log.line(averaged, step, elapsed, elapsed / progress - elapsed, [x.item() for x in (total, *parts)],
                     s.lr * schedule, gradient.item(), seen / (elapsed - pause))
            pause += time.perf_counter() - start - elapsed
    log.file.close()
    return averaged, {"train_seconds": time.perf_counter() - start, "steps": step}


# ─── Baselines ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def constant_baseline(train: list[Frame], test: list[Frame], config: facet.Config) -> list[dict]:
    """What E0 per species alone predicts: no forces, no stress."""
    E0 = np.array(config.reference_energies)
    return [{"energy": E0[f.graph.species].sum(), "forces": np.zeros_like(f.forces), "stress": np.zeros((3, 3))} for f in test]


def pair_baseline(train: list[Frame], test: list[Frame], config: facet.Config) -> list[dict]:
    """One spline V(r) for all pairs, E = Σ E0 + ½ Σ_ij V(r_ij), fitted to energies and forces by least squares."""
    spline, Z = facet.RadialSplines(1, config).double(), len(config.species)

    def rows(frame):
        """Energy [Z+R], forces [3N, Z+R] and stress [9, Z+R] as linear functions of E0 and the spline's coefficients."""
        r = torch.from_numpy(np.linalg.norm(frame.graph.vectors, axis=1))
        value, (_, slope) = spline.basis(r).numpy(), torch.func.jvp(spline.basis, (r,), (torch.ones_like(r),))  # [E, R]
        counts = np.bincount(frame.graph.species, minlength=Z)
        pull = (slope.numpy() / r.numpy()[:, None])[:, None] * frame.graph.vectors[:, :, None]  # [E, 3, R]
        force = np.zeros((len(frame.atoms), 3, value.shape[1]))
        np.add.at(force, frame.graph.dst, pull)
        stress = np.einsum("ea,ebr->abr", frame.graph.vectors, pull) / 2 / frame.graph.volume
        pad = [(0, 0), (Z, 0)]
        return np.concatenate([counts, value.sum(0) / 2]), np.pad(force.reshape(-1, value.shape[1]), pad), np.pad(stress.reshape(9, -1), pad)

    some = train[::1 + sum(len(f.atoms) for f in train) // 5000]  # some thousand atoms are plenty for so few numbers
    linear = [rows(frame) for frame in some]
    design = np.concatenate([np.concatenate([e[None] / len(f.atoms), F]) for (e, F, _), f in zip(linear, some)])
    target = np.concatenate([np.append(f.energy / len(f.atoms), f.forces) for f in some])
    fitted = np.linalg.lstsq(design, target, rcond=None)[0]
    return [{"energy": e @ fitted, "forces": (F @ fitted).reshape(-1, 3), "stress": (W @ fitted).reshape(3, 3)}
            for e, F, W in map(rows, test)]


# ─── Report ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def plot_parity(predictions: list[dict], test: list[Frame], table: dict, path: Path) -> None:
    """Predicted against reference energies, forces and stresses of the test set."""
    from matplotlib.figure import Figure  # slow to import; Figure without pyplot needs no display and keeps no state
    figure = Figure((11, 3.8), layout="constrained")
    atoms = np.array([len(f.atoms) for f in test])
    mean = np.mean([f.energy / len(f.atoms) for f in test])
    panels = [("energy − mean", "eV/atom", np.array([f.energy for f in test]) / atoms - mean,
               np.array([p["energy"] for p in predictions]) / atoms - mean, f"{table['energy_mae_meV_per_atom']:.2f} meV/atom"),
              ("force", "eV/Å", np.concatenate([f.forces.ravel() for f in test]),
               np.concatenate([p["forces"].ravel() for p in predictions]), f"{1000 * table['force_mae_eV_per_A']:.1f} meV/Å")]
    if table["stress_mae_GPa"] is not None:
        panels.append(("stress", "GPa", np.concatenate([f.stress.ravel() for f in test]) / units.GPa,
                       np.concatenate([p["stress"].ravel() for p in predictions]) / units.GPa, f"{table['stress_mae_GPa']:.3f} GPa"))
    for axis, (name, unit, x, y, mae) in zip(figure.subplots(1, len(panels)), panels):
        limits = [np.nanmin(x), np.nanmax(x)]
        axis.plot(limits, limits, color="0.6", linewidth=0.8)
        axis.plot(x, y, ".", markersize=3 if len(x) > 300 else 6, color="tab:blue", rasterized=True)
        axis.set(xlabel=f"reference {name} ({unit})", ylabel=f"Facet {name} ({unit})", title=f"MAE {mae}")
    figure.savefig(path, dpi=130)


def plot_splines(before: torch.Tensor, model: facet.Facet, path: Path) -> None:
    """The learned radial functions of every layer and harmonic degree, with what they were before training."""
    from matplotlib.figure import Figure
    config = model.config
    T, L, B = config.layers, config.degree, config.groups
    r = torch.linspace(max(0.0, config.first_knot - 0.3), config.cutoff, 300)
    basis = model.splines.basis(r)
    shape = (len(r), T, B, L + 1)
    old, new = ((basis @ c.cpu()).view(shape).numpy() for c in (before, model.splines.coefficients.detach()))
    figure = Figure((3.4 * (L + 1), 2.3 * T), layout="constrained")
    for (t, l), axis in np.ndenumerate(np.empty((T, L + 1))):
        axis = figure.add_subplot(T, L + 1, t * (L + 1) + l + 1)
        axis.plot(r, old[:, t, :, l], color="0.8", linewidth=0.8)
        axis.plot(r, new[:, t, :, l], linewidth=1.2)
        axis.set(title=f"layer {t + 1}, l = {l}", xlabel="r (Å)" if t == T - 1 else "", ylabel="φ" if l == 0 else "")
    figure.suptitle("Radial functions: learned (colours, one per group) and as they started (grey)")
    figure.savefig(path, dpi=110)


def relax_held_out(model: facet.Facet) -> dict:
    """Relax a strained, rattled cell of an alloy that was not trained on, with EMT and with Facet; compare the lattices."""
    start = ase.build.bulk("Cu", a=3.75, cubic=True)
    start.symbols = ["Au", "Cu", "Cu", "Cu"]
    start.set_cell(start.cell.array @ (np.eye(3) + [[0.03, 0.02, 0], [0, -0.03, 0], [0.01, 0, 0.04]]), scale_atoms=True)
    start.rattle(0.05, seed=0)
    result = {"structure": f"{HELD_OUT} (L1₂), strained and rattled"}
    for name, calculator in (("emt", EMT()), ("facet", facet.FacetCalculator(model))):
        atoms = start.copy()
        atoms.calc = calculator
        optimizer = FIRE(FrechetCellFilter(atoms), logfile=None)
        converged = optimizer.run(fmax=0.01, steps=500)
        result[name] = {"lattice_constant_A": float(atoms.get_volume() ** (1 / 3)), "steps": optimizer.nsteps,
                        "converged": bool(converged), "energy_eV_per_atom": float(atoms.get_potential_energy() / len(atoms))}
    return result


def report(model: facet.Facet, before: torch.Tensor, train: list[Frame], test: list[Frame], s: Settings, folder: Path) -> dict:
    """Print the test table with its baselines, draw the pictures; returns the numbers."""
    predictions = predict(model, test, s.batch_atoms, next(model.parameters()).device)
    rows = {"Facet": errors(predictions, test),
            "mean pair potential (one spline)": errors(pair_baseline(train, test, model.config), test),
            "constant per species": errors(constant_baseline(train, test, model.config), test)}
    print(f"\n{len(test)} test structures               energy MAE (RMSE) meV/atom    force MAE (RMSE) eV/Å    stress MAE (RMSE) GPa")
    for name, e in rows.items():
        stress = "       –" if e["stress_mae_GPa"] is None else f"{e['stress_mae_GPa']:10.3f} ({e['stress_rmse_GPa']:.3f})"
        print(f"  {name:34s} {e['energy_mae_meV_per_atom']:12.2f} ({e['energy_rmse_meV_per_atom']:.2f}) "
              f"{e['force_mae_eV_per_A']:18.4f} ({e['force_rmse_eV_per_A']:.4f}) {stress}")
    plot_parity(predictions, test, rows["Facet"], folder / "parity.png")
    plot_splines(before, copy.deepcopy(model).cpu(), folder / "splines.png")
    return {**rows["Facet"], "baselines": {name: e for name, e in rows.items() if name != "Facet"}}


# ─── Command line ──────────────────────────────────────────────────────────────────────────────────────────────────────

def new_folder(out: Path, name: str) -> Path:
    """runs/NAME, or runs/NAME-2 … where that holds results already."""
    folder, n = out / name, 1
    while folder.exists():
        n += 1
        folder = out / f"{name}-{n}"
    folder.mkdir(parents=True)
    return folder


def main(s: Settings, command: str = "", out: Path = Path("runs")) -> dict:
    """Read, train, test, draw; returns what result.json holds. Raises BadInput."""
    began = time.perf_counter()
    embedded = not s.train
    out.mkdir(parents=True, exist_ok=True)
    s = replace(s, minutes=s.minutes or (1.75 if embedded else 9.5), device=s.device or ("cuda" if torch.cuda.is_available() else "cpu"),
                name=s.name or ("emt" if embedded else Path(s.train[0].replace("*", "")).name.split(".")[0]))
    train = embedded_set(out) if embedded else read(s.train, s.stress_weight > 0)
    train, test = (train, read(s.test, s.stress_weight > 0)) if s.test else split(train, s.seed)
    s = replace(s, batch_atoms=s.batch_atoms or ten_structures(train))
    torch.manual_seed(s.seed)
    config = configure(train, test, s)
    model = facet.Facet(config).to(s.device)
    before, parameters = model.splines.coefficients.detach().clone(), sum(p.numel() for p in model.parameters())
    folder = new_folder(out, s.name)
    print(f"{len(train)} structures to train on, {len(test)} to test; {sum(len(f.atoms) for f in train)} atoms of {' '.join(config.species)}; "
          f"{config.mean_neighbours:.1f} neighbours each, splines from {config.first_knot:.2f} to {config.cutoff:g} Å; "
          f"force RMS {config.energy_scale:.2f} eV/Å\n"
          f"Facet with {parameters} parameters, on {s.device}, {torch.get_num_threads()} threads, "
          + (f"{s.steps} steps" if s.steps else f"{s.minutes:g} minutes") + f" → {folder}/")
    model, trained = train_model(model, train, test, s, folder)
    result = {**report(model, before, train, test, s, folder), "parameters": parameters, **trained}
    if embedded:
        result["relaxation"] = relax = relax_held_out(model)
        a, b = relax["emt"], relax["facet"]
        print(f"\n{relax['structure']}, relaxed by FIRE with FrechetCellFilter: EMT a = {a['lattice_constant_A']:.4f} Å in {a['steps']} steps, "
              f"Facet a = {b['lattice_constant_A']:.4f} Å in {b['steps']} steps ({100 * (b['lattice_constant_A'] / a['lattice_constant_A'] - 1):+.2f} %)")
    result.update(device=torch.cuda.get_device_name() if "cuda" in s.device else "cpu", torch_threads=torch.get_num_threads(),
                  torch=torch.__version__, command=command, settings=asdict(s), config=asdict(config),
                  total_seconds=time.perf_counter() - began)
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    print(f"\n{folder}/: model.pt, metrics.csv, result.json, parity.png, splines.png; {result['total_seconds']:.0f} s in all")
    return result


def parse(arguments: list[str]) -> Settings:
    """Settings from the command line; a wrong flag ends the program with one sentence and code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(Settings):
        many = isinstance(f.default, tuple)
        shown = "" if f.default in ((), "", 0) else f" (default {f.default})"
        parser.add_argument(f"--{f.name}", default=f.default, metavar=f.name.upper() if f.default == "" else "FILE" if many else "X",
                            help=f.metadata["help"] + shown, **({"nargs": "+"} if many else {"type": type(f.default)}))
    given = vars(parser.parse_args(arguments))
    s = Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    if s.test and not s.train:
        parser.error("--test without --train: say what to train on")
    for name in ("minutes", "steps", "lr", "batch_atoms", "cutoff", "stress_weight", "energy_start", "energy_end", "huber"):
        if getattr(s, name) < 0 or (getattr(Settings, name) > 0 and getattr(s, name) == 0):
            parser.error(f"--{name} {getattr(s, name)}: must be positive")
    try:
        torch.empty(0, device=s.device or "cpu")
    except (RuntimeError, AssertionError):
        parser.error(f"--device {s.device}: PyTorch has no such device here; try --device cpu")
    return s


if __name__ == "__main__":
    settings = parse(sys.argv[1:])
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        main(settings, shlex.join(["python", *sys.argv]))
    except (BadInput, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the weights of the last line above are in model.pt")
