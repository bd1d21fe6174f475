"""Train a small Facet."""
from __future__ import annotations

import argparse
import copy
import csv
import glob
import gzip
import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms, units
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from torch.nn.functional import smooth_l1_loss

import facet

KBAR = -0.1 * units.GPa  # VASP reports pressure-like stress in kbar; ASE wants tension in eV/Å³


class BadData(ValueError):
    """Input that cannot be trained on; the message names file, frame and cure."""


@dataclass
class Frame:
    atoms: Atoms
    energy: float               # eV
    forces: np.ndarray          # [N, 3] eV/Å
    stress: np.ndarray | None   # [3, 3] eV/Å³, ASE sign
    name: str                   # "file, frame 3"
    group: str                  # frames of one group stay on one side of a split
    graph: facet.Neighbours | None = None


def frames_of_json(data, name):
    """MPtrj layout {material: {frame: {...}}} -> Frames."""
    for material, frames in data.items():
        for key, f in frames.items():
            sites = f["structure"]["sites"]
            atoms = Atoms([s["species"][0]["element"] for s in sites], [s["xyz"] for s in sites],
                          cell=f["structure"]["lattice"]["matrix"], pbc=True)
            yield Frame(atoms, f["corrected_total_energy"], np.array(f["force"]), np.array(f["stress"]) * KBAR,
                        f"{name}, frame {key}", material)


def read(patterns):
    frames = []
    for pattern in patterns:
        for path in sorted(glob.glob(pattern)):
            if ".json" in path:
                with (gzip.open if path.endswith("gz") else open)(path, "rt") as f:
                    frames += frames_of_json(json.load(f), path)
                continue
            for i, atoms in enumerate(ase.io.iread(path, index=":")):
                c = atoms.calc.results
                frames.append(Frame(atoms, c["energy"], c["forces"], voigt_6_to_full_3x3_stress(c["stress"]) if "stress" in c else None,
                                    f"{path}, frame {i}", f"{path}{i}"))
    return frames


def main(a):
    torch.manual_seed(a.seed)
    rng = np.random.default_rng(a.seed)
    train, test = read(a.train), read(a.test)
    species = tuple(sorted({s for f in train + test for s in f.atoms.symbols}))
    count = np.array([[list(f.atoms.symbols).count(s) for s in species] for f in train])
    energy = np.array([f.energy for f in train])
    E0 = np.linalg.lstsq(count, energy, rcond=None)[0]
    frms = float(np.sqrt(np.mean(np.concatenate([f.forces for f in train]) ** 2)))
    cfg = facet.Config(species, cutoff=a.cutoff, channels=a.channels, groups=a.groups, degree=a.degree, layers=a.layers, splines=a.splines, energy_scale=frms, reference_energies=tuple(E0))
    for f in train + test:
        f.graph = facet.find_neighbours(f.atoms, cfg)
    mean = np.concatenate([np.bincount(f.graph.dst, minlength=len(f.atoms)) for f in train]).mean()
    rmin = min(np.linalg.norm(f.graph.vectors, axis=1).min() for f in train)
    cfg = facet.Config(**{**asdict(cfg), "mean_neighbours": float(mean), "first_knot": a.first * rmin})
    model = facet.Facet(cfg)
    npar = sum(p.numel() for p in model.parameters())
    print(f"{len(train)} train {len(test)} test, species {species}, neighbours {mean:.1f}, shortest {rmin:.2f}, force rms {frms:.2f}, {npar} parameters, {torch.get_num_threads()} threads")
    ema = copy.deepcopy(model)
    if a.muon:
        mats = [p for n, p in model.named_parameters() if p.ndim == 2 and "mix" in n]
        ids = {id(p) for p in mats}
        opts = [torch.optim.AdamW([p for p in model.parameters() if id(p) not in ids], lr=a.lr, weight_decay=a.wd, betas=(.9, a.b2)), torch.optim.Muon(mats, lr=a.muon, weight_decay=a.wd)]
    else:
        opts = [torch.optim.AdamW(model.parameters(), lr=a.lr, weight_decay=a.wd, betas=(.9, a.b2))]
    base = [[g["lr"] for g in o.param_groups] for o in opts]

    def loss_of(model, frames, we):
        b = facet.make_batch([f.graph for f in frames], cfg.cutoff)
        o = model(b, training=True)
        n = torch.tensor([len(f.atoms) for f in frames])
        E = torch.tensor([f.energy for f in frames], dtype=torch.float64)
        F = torch.from_numpy(np.concatenate([f.forces for f in frames])).float()
        W = torch.from_numpy(np.stack([f.stress for f in frames])).float()
        le = smooth_l1_loss(o["energy"] / n / frms, E / n / frms, beta=a.beta_e).float()
        lf = smooth_l1_loss(o["forces"] / frms, F / frms, beta=a.beta)
        vol = (b.volume / n).float()[:, None, None]
        ls = smooth_l1_loss(o["stress"] * vol / frms, W * vol / frms, beta=a.beta)
        return we * le + lf + a.ws * ls, le, lf, ls

    @torch.no_grad()
    def evaluate(model):
        de, df, ds = [], [], []
        for k in range(0, len(test), 8):
            fr = test[k:k + 8]
            o = model(facet.make_batch([f.graph for f in fr], cfg.cutoff))
            n = np.array([len(f.atoms) for f in fr])
            de.append((o["energy"].numpy() - [f.energy for f in fr]) / n)
            df.append(o["forces"].numpy() - np.concatenate([f.forces for f in fr]))
            ds.append(o["stress"].numpy() - np.stack([f.stress for f in fr]))
        return [np.abs(np.concatenate(x)).mean() for x in (de, df, ds)]

    start = time.perf_counter(); step = 0; order = []
    while True:
        progress = (time.perf_counter() - start) / (60 * a.minutes) if not a.steps else step / a.steps
        if progress >= 1: break
        if not len(order): order = list(rng.permutation(len(train)))
        batch, n = [], 0
        while order and n < a.atoms:
            f = train[order.pop()]; batch.append(f); n += len(f.atoms)
        warm = min(1, (step + 1) / 50)
        fac = warm * (0.5 * (1 + np.cos(np.pi * progress)) if progress > a.flat else 1)
        if a.flat: fac = warm * min(1, (1 - progress) / (1 - a.flat)) 
        for o, l in zip(opts, base):
            for g, x in zip(o.param_groups, l): g["lr"] = x * fac
        we = a.we0 * (a.we1 / a.we0) ** progress
        L, le, lf, ls = loss_of(model, batch, we)
        for o in opts: o.zero_grad()
        L.backward()
        gn = torch.nn.utils.clip_grad_norm_(model.parameters(), a.clip)
        for o in opts: o.step()
        d = min(a.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)
        step += 1
        if step % a.every == 0:
            e, f_, s_ = evaluate(ema)
            print(f"{step} {time.perf_counter()-start:.0f}s loss {L.item():.4f} le {le.item():.5f} lf {lf.item():.4f} ls {ls.item():.4f} gn {gn:.2f} test {e*1e3:.2f} meV {f_:.4f} eV/A {s_*160.2:.3f} GPa", flush=True)
    e, f_, s_ = evaluate(ema)
    print(f"FINAL {vars(a)} {step} steps {time.perf_counter()-start:.0f}s params {npar} test {e*1e3:.3f} meV {f_:.4f} eV/A {s_*160.2:.3f} GPa", flush=True)


p = argparse.ArgumentParser()
p.add_argument("--train", nargs="+"); p.add_argument("--test", nargs="+")
for k, v in dict(cutoff=5., channels=32, groups=8, degree=2, layers=3, splines=24, first=.9, lr=5e-3, wd=1e-3, b2=.999, muon=0., beta=.1, beta_e=.01, ws=.1, we0=1., we1=10., clip=1., ema=.99, flat=0., minutes=3., atoms=250, seed=0, every=500, steps=0).items():
    p.add_argument("--" + k, type=type(v), default=v)
a = p.parse_args()
import ctypes; _l = ctypes.CDLL(None); _l.mallopt(-3, 1 << 30); _l.mallopt(-1, 2**31 - 1); _l.mallopt(-2, 1 << 28)
main(a)
