"""SevenNet-0 with facet.py's radial splines in place of its radial MLPs: parameters, and the cost.

    python benchmarks/sevennet_trim.py            # 31 minutes at a load of 8
    python benchmarks/sevennet_trim.py --quick    # 46 s: 3 crystals, one step; writes nothing

SevenNet-0 (Park et al., J. Chem. Theory Comput. 20, 4857 (2024); needs the package sevenn) has five
layers. In each an MLP 8→64→64→out turns the distance of an edge into the weights of its messages.
An MLP of one number is a set of functions of one variable: here they become
weight[o] = Σ_b φ_b(r) mixing[b, o] with a few learned splines φ_b (facet.RadialSplines).

How it is done, without training: the MLPs are sampled at distances that occur; a weighted SVD finds
the combinations of their outputs that matter most (an output counts by the gradient of the energy
with respect to it, and slopes count besides values because forces are slopes); least squares turns
each combination into a spline, and gives the mixing. In "greedy" the number of functions
differs by layer: each next one goes where it removes most of the error per parameter.

Exact folds, which change nothing: the readout 128→64→1 has no activation between its two matrices,
so one vector does; an element's embedding only passes through linear maps before the first message,
so a table of what comes out does.

"Tuned" variants then learn SevenNet-0's own energies, forces and stresses on other rattled
crystals: only the splines and their mixing change. Everything is judged on crystals with
compositions that neither the SVD nor the tuning has seen. Molecules in boxes, whose bonds are
shorter, are in all these sets; their forces are reported apart. Below FIRST_KNOT the splines run
out, and atoms as close as that are not described. Writes benchmarks/results/sevennet_trim.json and
its picture.
"""
from __future__ import annotations

import copy
import os
import re
import time
import warnings

import ase.build
import numpy as np
import sevenn._keys as KEY
import torch
from ase.data import chemical_symbols, reference_states
from ase.units import GPa
from common import columns, command_line, hardware, in_turn, versions, write_results
from pictures import draw_results
from sevenn.atom_graph_data import AtomGraphData
from sevenn.train.dataload import unlabeled_atoms_to_graph
from sevenn.util import load_checkpoint
from summary import trim
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch_geometric.data import Batch

import facet

LAYERS = 5
CUTOFF = 5.0  # Å
FIRST_KNOT = 0.7  # Å
SPLINES = 64  # on the radial axis
SLOPE = 0.3  # Å; how much an error of a slope counts against one of a value, in the SVD
BUDGET = 631_830  # parameters: 25 % fewer than SevenNet-0's 842,440
SMALL = 606_556  # 28 % fewer
ALIKE = {"energy": 0.5, "force": 4.0, "stress": 0.05}  # meV/atom, meV/Å, GPa: equal in tuning
KEYS = {"energy": KEY.PRED_TOTAL_ENERGY, "force": KEY.PRED_FORCE, "stress": KEY.PRED_STRESS}
UNITS = {"energy": 1e3, "force": 1e3, "stress": 1 / GPa}  # to meV/atom, meV/Å, GPa


# ─── 1 Crystals ──────────────────────────────────────────────────────────────────────────────────

# Formula, lattice constant in Å; those at even places are for fitting and tuning, the others for
# the test. Molecules stand in a box: their bonds are shorter than in crystals.
COMPOUNDS = {
    "rocksalt": "LiF 4.03 NaCl 5.64 KBr 6.60 RbI 7.34 MgO 4.21 LiH 4.08 SrS 6.02 CaO 4.81 TiC 4.33 "
                "BaSe 6.60 ZrC 4.70 TiN 4.24 FeO 4.33 VN 4.14 PbTe 6.46 NiO 4.18 MnS 5.22 "
                "CdO 4.70 HfN 4.52 SnSe 5.99",
    "zincblende": "BN 3.62 AlP 5.46 GaAs 5.65 InP 5.87 CdTe 6.48 CuCl 5.42 InSb 6.48 BAs 4.78 "
                  "AlAs 5.66 GaP 5.45 ZnSe 5.67 CuBr 5.69",
    "wurtzite": "ZnO 3.25 BeO 2.70 GaN 3.19 AlN 3.11 InN 3.54 CdS 4.14 CdSe 4.30 ZnS 3.82 SiC 3.08 "
                "AgI 4.58",
    "cesiumchloride": "CsCl 4.12 TlBr 3.99 NiAl 2.89 CuZn 2.95 FeTi 2.98 CoAl 2.86 AgMg 3.31 "
                      "RuTi 3.06",
    "fluorite": "CaF2 5.46 SrF2 5.80 CeO2 5.41 ZrO2 5.07 UO2 5.47 HfO2 5.12 BaCl2 7.31 ScH2 4.78",
    "perovskite": "SrTiO3 3.91 BaTiO3 4.01 LaAlO3 3.79 KTaO3 3.99 NaNbO3 3.95 CsPbBr3 5.87 "
                  "KMgF3 3.99 BaZrO3 4.19 CsSnI3 6.22 RbCaF3 4.45",
    "molecule": "CH4 0 H2O 0 HCN 0 NH3 0 CO 0 CO2 0 C2H4 0 CH3OH 0 N2H4 0 SiH4 0"}


def lattices() -> list[tuple[str, str, float]]:
    """Structure, formula, lattice constant: elements from ASE's reference states, and compounds."""
    elements = []
    for symbol, state in zip(chemical_symbols[:95], reference_states, strict=False):
        simple = state and state["symmetry"] in ("fcc", "bcc", "hcp", "diamond")
        if simple and symbol not in ("Po", "Se", "Te"):
            elements.append((state["symmetry"], symbol, state["a"]))
    compounds = []
    for kind, text in COMPOUNDS.items():
        words = text.split()
        for formula, a in zip(words[::2], words[1::2], strict=True):
            compounds.append((kind, formula, float(a)))
    return sorted(elements) + compounds


def build(kind: str, formula: str, a: float) -> ase.Atoms:
    """2 to 12 atoms, not yet rattled."""
    if kind == "molecule":
        return ase.build.molecule(formula, vacuum=3.0, pbc=True)
    if kind == "perovskite":
        A, B, X = re.findall("[A-Z][a-z]?", formula)
        places = np.array([[0, 0, 0], [1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]]) / 2
        return ase.Atoms([A, B, X, X, X], scaled_positions=places, cell=[a] * 3, pbc=True)
    if kind == "wurtzite":
        return ase.build.bulk(formula, kind, a=a, c=1.61 * a)
    if kind == "hcp":
        cell = ase.build.bulk(formula)
    else:
        cell = ase.build.bulk(formula, kind, a=a, cubic=True)
    return cell * (2, 1, 1) if len(cell) < 4 else cell


def crystals(test: bool, copies: int, seed: int) -> list[ase.Atoms]:
    """Every second lattice, `copies` of each: strained by about 2 %, atoms displaced by 0.05–0.1 Å.
    """
    rng = np.random.default_rng(seed)
    found = []
    for kind, formula, a in lattices()[test::2] * copies:
        atoms = build(kind, formula, a)
        strain = rng.normal(0, 0.015, (3, 3)) + rng.normal(0, 0.02) * np.eye(3)
        if kind != "molecule":
            atoms.set_cell(atoms.cell @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
        atoms.positions += rng.normal(0, rng.uniform(0.05, 0.1), atoms.positions.shape)
        atoms.info["kind"] = kind
        found.append(atoms)
    return found


def graph(atoms: ase.Atoms) -> AtomGraphData:
    return AtomGraphData.from_numpy_dict(unlabeled_atoms_to_graph(atoms, CUTOFF))


def evaluate(model: nn.Module, graphs: list) -> list[dict[str, Tensor]]:
    """Energy per atom, forces, stress of each crystal."""
    model.eval()
    results = []
    for g in graphs:
        out = model(Batch.from_data_list([g]))
        result = {name: out[key].detach().double() for name, key in KEYS.items()}
        result["energy"] = result["energy"] / len(g.pos)
        results.append(result)
    return results


def errors(found: list, wanted: list, molecules: list[bool]) -> dict[str, float]:
    """Mean absolute differences over the crystals, and of forces over the molecules."""

    def mean(name: str, which: bool) -> float:
        differences = [
            (one[name] - other[name]).flatten().abs()
            for one, other, molecule in zip(found, wanted, molecules, strict=True)
            if molecule == which]
        return UNITS[name] * torch.cat(differences).mean().item() if differences else np.nan

    return {
        "energy_meV_per_atom": mean("energy", False), "force_meV_per_A": mean("force", False),
        "stress_GPa": mean("stress", False), "molecule_force_meV_per_A": mean("force", True)}


# ─── 2 Exact folds ───────────────────────────────────────────────────────────────────────────────


class Table(nn.Module):
    """x [N, in] → x weight [N, out], and zeros up to `width`: an element begins with scalars."""

    def __init__(self, weight: Tensor, width: int):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x @ self.weight, (0, self.width - self.weight.shape[1]))


@torch.no_grad()
def fold(model: nn.Module, embedding: bool) -> nn.Module:
    """Replace products of matrices by their product.

    Whatever is linear is given by what it does to the unit matrix.
    """
    part = model.get_submodule
    hidden = part("reduce_input_to_hidden")
    energy = part("reduce_hidden_to_energy")
    energy.linear = Table(energy.linear(hidden.linear(torch.eye(128))), 1)
    hidden.linear = nn.Identity()
    if embedding:
        embed = part("onehot_to_feature_x")
        elements = embed.linear(torch.eye(len(model.type_map)))  # [89, 128]
        for name in ("0_self_connection_intro", "0_self_interaction_1"):
            table = part(name).linear(elements)
            used = int(table.any(0).sum())  # scalars come first
            part(name).linear = Table(table[:, :used], table.shape[1])
        embed.linear = nn.Identity()
    return model


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ─── 3 Radial functions ──────────────────────────────────────────────────────────────────────────


class Distance(nn.Module):
    """In place of SevenNet's Bessel functions: the distance itself."""

    def forward(self, r: Tensor) -> Tensor:
        return r[..., None]


class One(nn.Module):
    """In place of its cutoff function: splines end at the cutoff by themselves."""

    def forward(self, r: Tensor) -> Tensor:
        return torch.ones_like(r)


class Radial(nn.Module):
    """In place of a radial MLP: r [E, 1] → φ(r) mixing [E, out].

    steps: by how much tuning may change coefficients and mixing.
    """

    def __init__(self, splines: facet.RadialSplines, mixing: Tensor, steps: tuple[Tensor, Tensor]):
        super().__init__()
        self.splines = splines
        self.mixing = nn.Parameter(mixing.float())
        self.steps = [s.float() for s in steps]

    def forward(self, r: Tensor) -> Tensor:
        return self.splines(r[:, 0]) @ self.mixing


def sensitivities(model: nn.Module, graphs: list) -> list[Tensor]:
    """How much an output of a radial MLP matters: root mean square over edges of dE/d(output).

    [out] for each layer.
    """
    outputs = []
    squares = [[] for _ in range(LAYERS)]

    def keep(module, inputs, output):
        output.retain_grad()
        outputs.append(output)

    hooks = []
    for t in range(LAYERS):
        mlp = model.get_submodule(f"{t}_convolution").weight_nn
        hooks.append(mlp.register_forward_hook(keep))
    force = model.get_submodule("force_output")
    for g in graphs:
        outputs.clear()
        model.replace_module("force_output", nn.Identity())
        model(Batch.from_data_list([g]))[KEY.PRED_TOTAL_ENERGY].sum().backward()
        for t, output in enumerate(outputs):
            squares[t].append(output.grad.square())
    model.replace_module("force_output", force)
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    return [torch.cat(s).mean(0).sqrt().double() for s in squares]


class Source:
    """SevenNet-0's radial MLPs: samples, weights of outputs, singular values and vectors."""

    def __init__(self, model: nn.Module, graphs: list):
        self.model = model.eval()
        occur = torch.cat([g[KEY.EDGE_VEC].norm(dim=-1) for g in graphs]).double().sort().values
        occur = occur[:: max(1, len(occur) // 3000)]

        # some more, evenly: the splines follow the MLP where no atom of these crystals is
        even = torch.linspace(FIRST_KNOT, CUTOFF, 6 * SPLINES, dtype=torch.float64)
        self.r = torch.cat([occur, even])

        embedding = copy.deepcopy(model.get_submodule("edge_embedding")).double()
        self.bessel = lambda r: embedding.basis_function(r) * embedding.cutoff_function(r)[:, None]
        self.mlps = []
        for t in range(LAYERS):
            layer = copy.deepcopy(model.get_submodule(f"{t}_convolution")).double()
            self.mlps.append(layer.weight_nn)
        self.weights = sensitivities(model, graphs)
        self.svd = [self.decompose([t]) for t in range(LAYERS)]

    @torch.no_grad()
    def outputs(self, layers: list[int], r: Tensor) -> Tensor:
        """Of the MLPs of these layers side by side, times their weights: [n, out]."""
        return torch.cat([self.mlps[t](self.bessel(r)) * self.weights[t] for t in layers], 1)

    def decompose(self, layers: list[int]) -> tuple[Tensor, Tensor]:
        """Singular values over √samples, falling [out]; right singular vectors [out, out]."""
        h = 1e-3  # Å, for slopes by central differences
        inside = self.r.clamp(max=CUTOFF - h)
        slope = (self.outputs(layers, inside + h) - self.outputs(layers, inside - h)) / (2 * h)
        both = torch.cat([self.outputs(layers, self.r), SLOPE * slope])
        values, vectors = torch.linalg.eigh(both.T @ both / len(self.r))
        return values.flip(0).clamp(min=0).sqrt(), vectors.flip(1)

    def radials(self, layers: list[int], count: int, svd: tuple[Tensor, Tensor]) -> list[Radial]:
        """`count` splines for these layers together, and what makes their outputs out of them."""
        S, V = svd
        config = facet.Config(("H",), cutoff=CUTOFF, splines=SPLINES, first_knot=FIRST_KNOT)
        splines = facet.RadialSplines(count, config)
        outputs = self.outputs(layers, self.r)  # [n, out]
        wanted = outputs @ V[:, :count] / S[:count]  # [n, count]
        basis = splines.basis(self.r)  # [n, SPLINES]
        fitted = torch.linalg.lstsq(basis, wanted, driver="gelsd").solution  # [SPLINES, count]
        splines.coefficients.data.copy_(fitted)

        # the mixing, with the weights: [count, out]
        mixing = torch.linalg.lstsq(basis @ fitted, outputs).solution

        left = S[count:].square().mean().sqrt()  # of an output, after the best `count` functions
        steps = left * len(V) ** 0.5 / S[:count]  # [count]
        splines = splines.float()
        weights = [self.weights[t] for t in layers]
        radials = []
        for m, w in zip(mixing.split([len(w) for w in weights], 1), weights, strict=True):
            radials.append(Radial(splines, m / w, (steps, left / w)))
        return radials

    def with_splines(self, counts: list[int] | None, shared: int = 0, folds: int = 0) -> nn.Module:
        """SevenNet-0 with counts[t] splines in layer t, or `shared` ones for all.

        folds: 1 the readout, 2 the embedding too.
        """
        model = copy.deepcopy(self.model)
        model = fold(model, folds == 2) if folds else model
        every = list(range(LAYERS))
        if shared:
            radials = self.radials(every, shared, self.decompose(every))
        else:
            radials = [self.radials([t], counts[t], self.svd[t])[0] for t in every]
        embedding = model.get_submodule("edge_embedding")
        embedding.basis_function = Distance()
        embedding.cutoff_function = One()
        for t, radial in enumerate(radials):
            model.get_submodule(f"{t}_convolution").weight_nn = radial
        return model

    @torch.no_grad()
    def with_bessel(self) -> nn.Module:
        """SevenNet-0 with a linear map of its 8 Bessel functions in place of each MLP."""
        model = copy.deepcopy(self.model)
        basis = self.bessel(self.r)  # [n, 8] times its cutoff function
        for t, mlp in enumerate(self.mlps):
            linear = nn.Linear(basis.shape[1], len(self.weights[t]), bias=False)
            linear.weight.copy_(torch.linalg.lstsq(basis, mlp(basis)).solution.T)
            model.get_submodule(f"{t}_convolution").weight_nn = linear
        return model

    def greedy(self, folds: int, budget: int = BUDGET) -> list[int]:
        """Functions in each layer, as many as the budget allows."""
        counts = [1] * LAYERS
        room = budget - parameters(self.with_splines(counts, folds=folds))
        costs = [len(w) + SPLINES for w in self.weights]
        while True:
            gains = np.zeros(LAYERS)
            for t, (S, _) in enumerate(self.svd):
                if costs[t] <= room:
                    gains[t] = float(S[counts[t]] ** 2) / costs[t]
            best = int(np.argmax(gains))
            if gains[best] == 0:
                return counts
            counts[best] += 1
            room -= costs[best]


# ─── 4 Tuning ────────────────────────────────────────────────────────────────────────────────────


class Scaled(nn.Module):
    """A parameter in units of the change that it may need, so that one learning rate suits all."""

    def __init__(self, unit: Tensor):
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        return x * self.unit

    def right_inverse(self, parameter: Tensor) -> Tensor:
        return parameter / self.unit


def tune(model: nn.Module, graphs: list, labels: list, steps: int) -> nn.Module:
    """A copy whose splines and mixing have learned the labels: Adam, cosine, MAE over ALIKE.

    Four crystals a step.
    """
    model = copy.deepcopy(model).train()
    radials = [model.get_submodule(f"{t}_convolution").weight_nn for t in range(LAYERS)]
    places = []
    for radial in radials:
        coefficients, mixing = radial.steps
        places += [(radial.splines, "coefficients", coefficients), (radial, "mixing", mixing)]
    for module, name, unit in places:
        parametrize.register_parametrization(module, name, Scaled(unit))
    learned = [p for radial in radials for p in radial.parameters()]
    adam = torch.optim.Adam(learned, lr=0.001, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    rng = np.random.default_rng(0)
    queue = []
    for step in range(steps):
        if len(queue) < 4:
            queue = rng.permutation(len(graphs)).tolist()
        chosen, queue = queue[:4], queue[4:]
        atoms = torch.tensor([len(graphs[i].pos) for i in chosen])
        out = model(Batch.from_data_list([graphs[i] for i in chosen]))
        loss = 0.0
        for name, key in KEYS.items():
            found = out[key] / atoms if name == "energy" else out[key]
            wanted = torch.cat([labels[i][name] for i in chosen])
            loss = loss + UNITS[name] / ALIKE[name] * (found - wanted).abs().mean()
        gradients = torch.autograd.grad(loss, learned)  # of these alone
        for p, gradient in zip(learned, gradients, strict=True):
            p.grad = gradient
        adam.step()
        schedule.step()
        if step % max(1, steps // 8) == 0 or step == steps - 1:
            print(f"    step {step:4d}  loss {loss.item():.3f}", flush=True)
    for module, name, _ in places:
        parametrize.remove_parametrizations(module, name)
    return model


# ─── 5 Table, figure, all of it ──────────────────────────────────────────────────────────────────


def variants(source: Source) -> dict[str, nn.Module]:
    """What is compared, before tuning."""
    models = {
        "SevenNet-0": source.model,
        "exact folds only": fold(copy.deepcopy(source.model), True),
        "8 Bessel a layer": source.with_bessel(),
        "8 splines a layer": source.with_splines([8] * LAYERS),
        "10 splines shared": source.with_splines(None, shared=10),
        "12 splines a layer": source.with_splines([12] * LAYERS),
    }
    ways = ((1, BUDGET, "readout folded"), (2, SMALL, "folds"), (2, BUDGET, "folds"))
    for folds, budget, text in ways:
        counts = source.greedy(folds, budget)
        name = f"greedy {' '.join(str(count) for count in counts)}, {text}"
        models[name] = source.with_splines(counts, folds=folds)
    return models


def all_rows(models: dict[str, nn.Module], found: dict[str, dict], seconds: float) -> list[dict]:
    """Parameters, speed and errors of each variant."""
    crystal = graph(ase.build.bulk("Cu", cubic=True))
    jobs = {}
    for name, model in models.items():
        jobs[name] = lambda model=model: model(Batch.from_data_list([crystal]))
    ms = in_turn(jobs, seconds)
    original = parameters(models["SevenNet-0"])

    rows = []
    for name, model in models.items():
        count = parameters(model)
        rows.append({
            "variant": name, "parameters": count, "fewer_percent": 100 * (1 - count / original),
            "speed": ms["SevenNet-0"] / ms[name], **found[name]})
    return rows


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run that writes nothing")
    parser.add_argument("--steps", type=int, default=60,
                        help="of each tuning, four crystals a step")
    args = parser.parse_args()
    start = time.perf_counter()
    load = os.getloadavg()[0]
    warnings.filterwarnings("ignore", category=UserWarning)  # of sevenn, about accelerators
    torch.set_num_threads(1)
    every, steps = (24, 1) if args.quick else (1, args.steps)

    # The model, and what it is judged on
    fitted = [graph(a) for a in crystals(False, 1, 0)[::every]]
    source = Source(load_checkpoint("7net-0").build_model(), fitted)
    atoms = crystals(True, 1, 1)[::every]
    graphs = [graph(a) for a in atoms]
    molecules = [a.info["kind"] == "molecule" for a in atoms]
    wanted = evaluate(source.model, graphs)
    print(
        f"{hardware()}, load {load:.1f}, 1 thread; test: {len(atoms)} crystals and molecules, "
        f"{sum(len(a) for a in atoms)} atoms", flush=True)

    # The variants, and two of them tuned
    models = variants(source)
    learn = [graph(a) for a in crystals(False, 3, 2)[::every]]
    labels = evaluate(source.model, learn)
    found = {}
    for name in [*models, *(f"{name}, tuned" for name in models if name.endswith(", folds"))]:
        if name not in models:
            models[name] = tune(models[name.removesuffix(", tuned")], learn, labels, steps)
        found[name] = errors(evaluate(models[name], graphs), wanted, molecules)
        print(f"  {name}: {found[name]['force_meV_per_A']:.2f} meV/Å", flush=True)

    results = {
        "load": load, "packages": versions("sevenn", "e3nn"),
        "rows": columns(all_rows(models, found, 1 if args.quick else 30)),
        "tuning": {"steps": steps, "crystals": len(learn)}}
    results["seconds"] = time.perf_counter() - start
    print("\n".join(trim(results["rows"])))
    print(f"{results['seconds']:.0f} s")
    if not args.quick:
        write_results("sevennet_trim", results)
        draw_results("sevennet_trim")


if __name__ == "__main__":
    main()
