"""The models that speed.py compares, and the worker process that times one of them.

    python benchmarks/peers.py "MACE 128x0e" --species 4 --threads 1

speed.py starts it with the Python of the model's package. A worker reads one JSON line per job from
its standard input and answers with one: {"job": "bare", "crystal": "Si 64"} gives {"ms": …,
"cpu_ms": …, "faults": …, "MB": …, "peak_GB": …}. Faults are the pages of memory that the call was
the first to touch; MB is the growth of the peak since the first job was prepared. It prepares what
the job needs, then times one call of it:

    bare         energy, forces and stress of the model alone, neighbours given
    calculator   the same through the package's ASE calculator, positions new every time,
                 neighbour list included
    train        forward, backward and an Adam step, loss on energy and forces, for "4 x Si 64",
                 four rattled copies; for "batches.extxyz 90" such a step on each batch of the file

Weights are random but for SevenNet-0: time does not depend on them. Everything is in float32,
cutoff 5 Å, and without a gradient for the weights (as MACE's calculator does it) but in training.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols
from common import ROOT, command_line, peak_GB, silicon, versions

CUTOFF = 5.0  # Å
SPECIES = {4: ["Na", "Si", "Cl", "Mo"], 89: chemical_symbols[1:90]}  # SevenNet-0 has 89


def crystal(name: str) -> Atoms:
    """Rattled silicon of so many atoms, such as "Si 64"."""
    kind, count = name.split()
    made = silicon(round((int(count) / 8) ** (1 / 3)))
    if kind != "Si" or len(made) != int(count):
        raise ValueError(f"there is no crystal {name}: silicon comes in 8 n³ atoms")
    return made


def batches(name: str) -> list[list[Atoms]]:
    """The one batch of "4 x Si 64"; those of a file, whose frames tell theirs in info["batch"]."""
    file, _, _ = name.rpartition(" ")
    if file.endswith(".extxyz"):
        grouped = groupby(ase.io.read(file, ":"), lambda atoms: atoms.info["batch"])
        return [list(frames) for _, frames in grouped]

    count, _, one = name.partition(" x ")
    rng = np.random.default_rng(2)
    copies = [crystal(one) for _ in range(int(count))]
    for copy in copies:
        copy.positions += rng.normal(0, 0.05, copy.positions.shape)
    return [copies]


# ─── The models ──────────────────────────────────────────────────────────────────────────────────


class Peer:
    """A model. `graph` is made outside of the timing, `evaluate` gives energy, forces and stress,
    `predict` what a loss on energies [S] and forces [N, 3] needs.
    """

    packages: tuple[str, ...] = ()

    def use(self, model: torch.nn.Module) -> None:
        self.model = model
        self.trainable = [p for p in model.parameters() if p.requires_grad]

    def prepare(self, training: bool) -> None:
        self.model.train(training)
        for parameter in self.trainable:
            parameter.requires_grad_(training)


class Facet(Peer):
    """The default model; "replayed": on a GPU, its calls as tools.replay does them."""

    def __init__(self, variant: str, symbols: list[str], device: str, folder: Path):
        import facet

        self.facet = facet
        self.device = device
        self.use(facet.Facet(facet.Config(tuple(symbols), cutoff=CUTOFF)).to(device))
        self.call = self.model
        if variant:
            from tools.replay import Replayed

            self.call = Replayed(self.model)

    def graph(self, crystals: list[Atoms]):
        neighbours = [self.facet.find_neighbours(atoms, self.model.config) for atoms in crystals]
        return self.facet.make_batch(neighbours, CUTOFF).to(self.device)

    def evaluate(self, graph) -> tuple:
        out = self.call(graph)
        return out["energy"], out["forces"], out["stress"]

    def predict(self, graph) -> tuple:
        out = self.model(graph, differentiable=True)
        return out["energy"].float(), out["forces"]

    def calculator(self):
        made = self.facet.FacetCalculator(self.model, self.device)
        made.model = self.call
        return made


class Mace(Peer):
    """ScaleShiftMACE.

    The 128-channel models have the settings of MACE-MP-0 small and medium but for the cutoff (5 Å
    instead of 6), the 64-channel model those that accuracy.py trains: MACE's defaults at max_ell 2,
    correlation 2. A name that ends in "cuequivariance" takes NVIDIA's kernels.
    """

    packages = ("mace-torch", "e3nn", "cuequivariance-torch")

    def __init__(self, variant: str, symbols: list[str], device: str, folder: Path):
        # mace first: it makes the old e3nn, which it needs, importable in today's PyTorch
        from mace import data, modules  # isort: skip
        from mace.calculators import MACECalculator  # isort: skip
        from mace.tools import AtomicNumberTable, torch_geometric  # isort: skip
        from e3nn.o3 import Irreps  # isort: skip

        self.data = data
        self.Batch = torch_geometric.Batch
        self.Calculator = MACECalculator
        self.device = device
        self.table = AtomicNumberTable([atomic_numbers[symbol] for symbol in symbols])
        irreps, *kernels = variant.split()
        small = irreps.startswith("64")
        residual = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
        first = modules.interaction_classes["RealAgnosticInteractionBlock"] if small else residual
        model = modules.ScaleShiftMACE(
            r_max=CUTOFF,
            num_bessel=8 if small else 10,
            num_polynomial_cutoff=5,
            max_ell=2 if small else 3,
            correlation=2 if small else 3,
            num_interactions=2,
            hidden_irreps=Irreps(irreps),
            MLP_irreps=Irreps("16x0e"),
            interaction_cls=residual,
            interaction_cls_first=first,
            radial_MLP=[64, 64, 64],
            gate=torch.nn.functional.silu,
            num_elements=len(symbols),
            atomic_numbers=self.table.zs,
            atomic_energies=np.zeros(len(symbols)),
            avg_num_neighbors=30.0,
            atomic_inter_scale=1.0,
            atomic_inter_shift=0.0,
        ).to(device)
        if kernels:
            from mace.cli.convert_e3nn_cueq import run

            model = run(model, device=device)
        self.use(model.float())

    def graph(self, crystals: list[Atoms]):
        configs = [self.data.config_from_atoms(atoms) for atoms in crystals]
        graphs = [
            self.data.AtomicData.from_config(config, z_table=self.table, cutoff=CUTOFF)
            for config in configs
        ]
        return self.Batch.from_data_list(graphs).to(self.device)

    def evaluate(self, graph) -> tuple:
        out = self.model(graph.to_dict(), compute_stress=True)
        return out["energy"], out["forces"], out["stress"]

    def predict(self, graph) -> tuple:
        out = self.model(graph.to_dict(), training=True)
        return out["energy"], out["forces"]

    def calculator(self):
        return self.Calculator(models=self.model, device=self.device, default_dtype="float32")


class SevenNet(Peer):
    """The pretrained SevenNet-0 of 11 July 2024; the checkpoint comes with the package."""

    packages = ("sevenn", "e3nn")

    def __init__(self, variant: str, symbols: list[str], device: str, folder: Path):
        from sevenn.atom_graph_data import AtomGraphData
        from sevenn.calculator import SevenNetCalculator
        from sevenn.train.dataload import unlabeled_atoms_to_graph
        from torch_geometric.data import Batch

        self.Data = AtomGraphData
        self.Batch = Batch
        self.build = unlabeled_atoms_to_graph
        self.device = device
        self.made = SevenNetCalculator("7net-0", device=device)
        if len(self.made.type_map) != len(symbols):
            raise ValueError("SevenNet-0 has 89 species and no other number")
        self.use(self.made.model)

    def graph(self, crystals: list[Atoms]):
        graphs = [self.Data.from_numpy_dict(self.build(atoms, CUTOFF)) for atoms in crystals]
        self.model.set_is_batch_data(len(graphs) > 1)
        graph = self.Batch.from_data_list(graphs) if len(graphs) > 1 else graphs[0]
        return graph.to(self.device)

    def evaluate(self, graph) -> tuple:
        out = self.model(graph.clone())  # it writes its results into the graph
        return out["inferred_total_energy"], out["inferred_force"], out["inferred_stress"]

    def predict(self, graph) -> tuple:
        return self.evaluate(graph)[:2]

    def calculator(self):
        self.model.set_is_batch_data(False)
        return self.made


class NequIP(Peer):
    """NequIP: 4 layers, l_max 2, 64 features.

    Parity is off; the radial MLP and the type embedding are as in the package's presets.
    "compiled": what `nequip-compile --mode aotinductor --target ase` makes of it, kept in `folder`;
    the number of threads is fixed in the generated code, so there is one file for each. Training is
    eager only.
    """

    packages = ("nequip", "e3nn")

    def __init__(self, variant: str, symbols: list[str], device: str, folder: Path):
        from nequip.data import AtomicDataDict
        from nequip.integrations.ase import NequIPCalculator
        from nequip.integrations.utils import basic_transforms
        from nequip.model import NequIPGNNModel
        from nequip.utils.global_state import set_global_state

        set_global_state(allow_tf32=False)
        self.join = AtomicDataDict.batched_from_list
        self.move = AtomicDataDict.to_
        self.device = device
        self.use(
            NequIPGNNModel(
                seed=0,
                model_dtype="float32",
                type_names=symbols,
                r_max=CUTOFF,
                num_layers=4,
                l_max=2,
                num_features=64,
                parity=False,
                type_embed_num_features=32,
                radial_mlp_depth=1,
                radial_mlp_width=128,
                avg_num_neighbors=30.0,
                per_type_energy_scales=1.0,
                per_type_energy_shifts=0.0,
            ).to(device)
        )
        self.prepare(training=False)
        self.transforms = basic_transforms(
            self.model.metadata, CUTOFF, symbols, {s: s for s in symbols}
        )
        if variant:
            version = "-".join(versions("nequip", "torch").values())
            threads = torch.get_num_threads()
            path = folder / f"nequip-{version}-{device}-{len(symbols)}-{threads}.nequip.pt2"
            if not path.exists():
                self.compile(path)
            self.made = NequIPCalculator.from_compiled_model(
                path, device, chemical_species_to_atom_type_map=True
            )
        else:
            self.made = NequIPCalculator(self.model, device, transforms=self.transforms)

    def compile(self, path: Path) -> None:
        """nequip-compile, given the model itself instead of the checkpoint of a training."""
        from nequip.scripts import compile as script

        script.load_saved_model = lambda *_, **__: (self.model, self.graph([crystal("Si 64")]))
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"part-{path.name}")
        script.main(
            ["none", str(part), "--mode", "aotinductor", "--device", self.device, "--target", "ase"]
        )
        part.replace(path)

    def graph(self, crystals: list[Atoms]):
        from nequip.data import from_ase

        graphs = [from_ase(atoms) for atoms in crystals]
        for transform in self.transforms:
            graphs = [transform(graph) for graph in graphs]
        return self.move(self.join(graphs) if len(graphs) > 1 else graphs[0], self.device)

    def evaluate(self, graph) -> tuple:
        out = self.made.model(dict(graph))
        return out["total_energy"], out["forces"], out["stress"]

    def predict(self, graph) -> tuple:
        out = self.model(dict(graph))
        return out["total_energy"], out["forces"]

    def calculator(self):
        return self.made


PEERS = {"Facet": Facet, "MACE": Mace, "SevenNet-0": SevenNet, "NequIP": NequIP}


# ─── The jobs ────────────────────────────────────────────────────────────────────────────────────


def bare(peer: Peer, name: str) -> Callable:
    graph = peer.graph([crystal(name)])
    return lambda: peer.evaluate(graph)


def calculator(peer: Peer, name: str) -> Callable:
    atoms = crystal(name)
    made = peer.calculator()
    rng = np.random.default_rng(1)
    home = atoms.positions.copy()

    def calculate():
        atoms.positions = home + rng.normal(0, 0.01, home.shape)
        made.calculate(atoms, ["energy", "forces", "stress"])

    return calculate


def train(peer: Peer, name: str) -> Callable:
    """Targets are zeros: what they are makes no difference to the time."""
    made = [(peer.graph(batch), sum(map(len, batch)) / len(batch)) for batch in batches(name)]
    optimizer = torch.optim.Adam(peer.trainable, lr=1e-5)

    def steps():
        for graph, mean_atoms in made:
            optimizer.zero_grad()
            energy, forces = peer.predict(graph)
            loss = (energy / mean_atoms).square().mean() + forces.square().mean()
            loss.backward()
            optimizer.step()

    return steps


JOBS = {"bare": bare, "calculator": calculator, "train": train}


# ─── The worker ──────────────────────────────────────────────────────────────────────────────────


def peak(device: str) -> float:
    """GB that this process (on a GPU: PyTorch there) has held at most."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return peak_GB()


def page_faults() -> int:
    """Pages of memory that this process was the first to touch, so far."""
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def limit(device: str) -> float:
    """GB that a process may hold."""
    if device == "cuda":
        return 0.9 * torch.cuda.get_device_properties(0).total_memory / 1e9
    return 16.0


class Worker:
    """Answers requests; what a request needs is prepared when it differs from the last one."""

    def __init__(self, args: argparse.Namespace):
        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        name, _, variant = args.model.partition(" ")
        self.peer = PEERS[name](variant, SPECIES[args.species], args.device, args.folder)
        self.device = args.device
        self.latest = None
        self.call = None
        self.prepared_GB = None  # peak when the first job was ready
        self.about = {
            "parameters": sum(p.numel() for p in self.peer.trainable),
            "ready_GB": peak(args.device),
            "limit_GB": limit(args.device),
            "versions": versions("torch", "ase", *self.peer.packages),
        }

    def answer(self, request: dict) -> dict:
        if request != self.latest:
            self.call = None  # frees the last one's memory
            self.peer.prepare(training=request["job"] == "train")
            self.call = JOBS[request["job"]](self.peer, request["crystal"])
            self.latest = request
            self.prepared_GB = self.prepared_GB or peak(self.device)
        synchronize = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        synchronize()
        faults = page_faults()
        start, cpu = time.perf_counter(), time.process_time()
        self.call()
        synchronize()
        ms = 1000 * (time.perf_counter() - start)
        cpu_ms = 1000 * (time.process_time() - cpu)
        faults = page_faults() - faults
        most = peak(self.device)
        return {"ms": ms, "cpu_ms": cpu_ms, "faults": faults,
                "MB": 1000 * (most - self.prepared_GB), "peak_GB": most}


def attempt(function: Callable, *args):
    """What the function returns, or {"error": …}."""
    try:
        return function(*args)
    except Exception as error:  # of whatever package: speed.py prints it and leaves the number out
        return {"error": (f"{type(error).__name__}: {error}".strip().splitlines() or ["?"])[0]}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "model", help='"Facet", "MACE 128x0e", "SevenNet-0", "NequIP", "NequIP compiled", …'
    )
    parser.add_argument("--species", type=int, choices=SPECIES, default=89)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/speed"), help="where compiled models are kept"
    )
    parser.add_argument("--tree", default=str(ROOT), metavar="FOLDER",
                        help="whose facet.py is measured; by default that of this repository")
    args = parser.parse_args()
    sys.path.insert(0, args.tree)
    warnings.simplefilter("ignore")
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the packages print goes to standard error
    worker = attempt(Worker, args)
    if isinstance(worker, dict):
        print(json.dumps(worker), file=replies)
        return
    print(json.dumps(worker.about), file=replies)
    for line in sys.stdin:
        print(json.dumps(attempt(worker.answer, json.loads(line))), file=replies)


if __name__ == "__main__":
    main()
