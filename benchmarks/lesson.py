"""Draw the pictures of the README's tour from the code itself: figures/flow, harmonics, grid, feature, splines, sum_first, drift.png.

    python train_small.py --name emt && python benchmarks/lesson.py --model runs/emt/model.pt        # a minute
"""
import argparse
from dataclasses import replace
from pathlib import Path

import ase.build
import matplotlib
import numpy as np
import torch
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from scipy.spatial.transform import Rotation

import common
import facet
from common import FIGURES

BLUE, ORANGE, GREY = "tab:blue", "tab:orange", "0.6"


def save(figure: Figure, name: str) -> None:
    figure.savefig(FIGURES / f"{name}.png", dpi=110, facecolor="white")
    print(f"figures/{name}.png")


def sphere(steps: int = 60) -> np.ndarray:
    """Directions on a net of angles, [steps, 2 steps, 3]."""
    theta, angle = np.meshgrid(np.linspace(0, np.pi, steps), np.linspace(0, 2 * np.pi, 2 * steps), indexing="ij")
    return np.stack([np.sin(theta) * np.cos(angle), np.sin(theta) * np.sin(angle), np.cos(theta)], -1)


def draw_function(axis, value: np.ndarray, xyz: np.ndarray, largest: float, lobes: bool) -> None:
    """A function on the sphere: as colours, or as lobes whose radius is its size."""
    shade = 0.5 + 0.5 * value / largest
    place = xyz * (np.abs(value) / largest)[..., None] if lobes else xyz
    axis.plot_surface(*np.moveaxis(place, -1, 0), facecolors=matplotlib.colormaps["RdBu_r"](shade), rstride=1, cstride=1, shade=lobes)
    axis.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
    axis.view_init(20, 30)
    axis.set_box_aspect((1, 1, 1), zoom=1.5)
    axis.set_axis_off()


def crystal_of(model: facet.Facet) -> Atoms:
    """Four rattled atoms of as many elements."""
    crystal = ase.build.bulk("Cu", "fcc", a=3.9, cubic=True)
    crystal.symbols = [model.config.species[i % len(model.config.species)] for i in range(4)]
    crystal.rattle(0.25, seed=1)
    return crystal


def flow(model: facet.Facet) -> None:
    """What goes through the network, with the shapes that hooks see."""
    shapes = {}
    for t, layer in enumerate(model.layers):
        for name in ("mix", "grid"):
            getattr(layer, name).register_forward_hook(lambda _, __, out, key=(t, name): shapes.update({key: tuple(out.shape)}))
    graph = facet.find_neighbours(crystal_of(model), model.config)
    batch = facet.make_batch([graph], model.config.cutoff, model.readout.dtype)
    model(batch)
    (N, K), T = batch.src.shape, model.config.layers
    figure = Figure((13, 4.4), layout="constrained")
    axis = figure.add_subplot()

    def box(x, y, text, colour, width=1.75, height=1.15):
        axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.08", facecolor=colour, edgecolor="0.3"))
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.5)

    def arrow(x0, y0, x1, y1):
        axis.add_patch(FancyArrowPatch((x0, y0), (x1, y1), arrowstyle="-|>", mutation_scale=12, color="0.3"))
    R, count = model.splines.coefficients.shape
    box(0, 1.5, f"crystal\n{N} atoms\n{K} neighbours", "#eeeeee")
    box(2.5, 2.7, f"splines φ\n{R} × {count}\n[{N}, {K}, {count}]", "#d9e8f6")
    box(2.5, 0.3, f"harmonics Y\n[{N}, {K}, {(model.config.degree + 1) ** 2}]", "#d9e8f6")
    arrow(1.85, 2.3, 2.4, 3.1)
    arrow(1.85, 1.8, 2.4, 1.0)
    for t in range(T):
        x = 5.1 + 2.5 * t
        paths = ", ".join(str(Q) for Q in model.layers[t].density.counts)
        out = shapes[t, "grid"]
        axis.text(x + 0.9, 4.75, f"layer {t + 1}", ha="center", weight="bold")
        box(x, 3.4, f"density\n{paths} paths to l = 0 …", "#fde9d3")
        box(x, 1.9, f"mix + skip\n[{shapes[t, 'mix'][0]}, {shapes[t, 'mix'][1]}, {shapes[t, 'mix'][2]}]", "#fde9d3")
        box(x, 0.4, f"grid layer, {len(model.layers[t].grid.to_grid)} points\n[{out[0]}, {out[1]}, {out[2]}]", "#fde9d3")
        arrow(x + 0.9, 3.3, x + 0.9, 3.15)
        arrow(x + 0.9, 1.8, x + 0.9, 1.65)
        arrow(x - 0.65, 1.0 if t else 2.1, x - 0.1, 3.6)
    arrow(5.1 + 2.5 * T - 0.6, 1.0, 5.1 + 2.5 * T - 0.1, 1.0)
    box(5.1 + 2.5 * T, 0.4, "energy, and by\none gradient\nforces, stress", "#e2f0d9")
    axis.set(xlim=(-0.2, 7.1 + 2.5 * T), ylim=(0.1, 5.2))
    axis.set_axis_off()
    axis.set_title(f"the default model on {N} atoms of {len(model.config.species)} elements; rows beyond {N} are free atoms, one per element")
    save(figure, "flow")


def harmonics() -> None:
    """Y_lm up to l = 3 as lobes, red positive, blue negative."""
    xyz, figure = sphere(), Figure((11, 6.4), layout="constrained")
    Y = facet.harmonics(torch.from_numpy(xyz), 3).numpy()
    for l in range(4):
        for m in range(-l, l + 1):
            axis = figure.add_subplot(4, 7, 7 * l + 4 + m, projection="3d")
            draw_function(axis, Y[..., l * l + l + m], xyz, np.abs(Y[..., l * l + l + m]).max(), lobes=True)
            axis.set_title(f"l = {l}, m = {m}", fontsize=8, y=1.0)
    save(figure, "harmonics")


def grid() -> None:
    """The 26 points, and what rotations about an axis of the grid can tell."""
    points, weights = (x.numpy() for x in facet.lebedev(6))
    figure = Figure((11, 4.2), layout="constrained")
    axis = figure.add_subplot(121, projection="3d")
    axis.computed_zorder = False
    axis.plot_surface(*np.moveaxis(0.98 * sphere(), -1, 0), color="0.93", shade=False, zorder=1)
    view = np.array([np.cos(np.radians(20)) * np.cos(np.radians(30)), np.cos(np.radians(20)) * np.sin(np.radians(30)), np.sin(np.radians(20))])
    front = points @ view > 0.05
    axis.scatter(*points[front].T, s=6000 * weights[front], c=weights[front], cmap="viridis", depthshade=False, zorder=3)
    for direction, colour in (([1, 0, 0], "tab:red"), ([0, 1, 0], "tab:red"), ([0, 0, 1], "tab:red"), ([1, 1, 1], "tab:green"), ([1, 1, 0], "tab:purple")):
        end = np.array(direction) / np.linalg.norm(direction)
        axis.plot(*np.stack([end, 1.5 * end], 1), color=colour, linewidth=2, zorder=2)
    axis.view_init(20, 30)
    axis.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
    axis.set_box_aspect((1, 1, 1), zoom=1.35)
    axis.set_axis_off()
    axis.set_title("26 points, sized by weight; axes of order 4, 3 and 2")
    curve, angles = figure.add_subplot(122), np.arange(0, 181, 3)
    x = torch.randn(50, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for kind, colour, name in ((facet.SiluGrid, ORANGE, "SiLU, 26 points"), (facet.ProductGrid, BLUE, "product, 26 points")):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = kind(2, facet.Config(("Si",), channels=16, grid_degree=6)).double().requires_grad_(False)
        for about, style in (([0, 0, 1], "-"), ([0.3, 0.5, 0.8], "--")):
            error = []
            for angle in angles:
                R = Rotation.from_rotvec(np.radians(angle) * np.array(about) / np.linalg.norm(about)).as_matrix()
                D = facet.rotation_of_rows(torch.from_numpy(R), 2)
                error.append(float((D @ layer(x) - layer(D @ x)).norm() / (layer(x) - x).norm()))
            curve.semilogy(angles, np.maximum(error, 1e-17), style, color=colour, label=f"{name}, about {'z' if about[2] == 1 else 'a generic axis'}")
    curve.set(title="error under rotation: 90° about z shows nothing", xlabel="angle (°)", ylabel="relative error", xticks=range(0, 181, 30))
    curve.legend(fontsize="small", loc="center right")
    save(figure, "grid")


def feature(model: facet.Facet) -> None:
    """One channel of one atom before and after the first grid layer, as a function on the sphere."""
    seen = []
    model.layers[0].grid.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0].detach(), out.detach())))
    model(facet.make_batch([facet.find_neighbours(crystal_of(model), model.config)], model.config.cutoff, model.readout.dtype))
    before, after = (x[0] for x in seen[0])  # [M, C]
    channel = int((after - before)[1:].norm(dim=0).argmax())
    xyz, figure = sphere(), Figure((11, 3.6), layout="constrained")
    Y = facet.harmonics(torch.from_numpy(xyz), model.config.degree)
    values = [(Y @ x[:, channel]).numpy() for x in (before, after, after - before)]
    for i, (value, title) in enumerate(zip(values, ("before the grid layer", "after", "what the layer added"))):
        axis = figure.add_subplot(1, 3, i + 1, projection="3d")
        draw_function(axis, value, xyz, max(np.abs(v).max() for v in values), lobes=False)
        axis.set_title(title)
    save(figure, "feature")


def splines(model: facet.Facet) -> None:
    """The basis, one function as a sum of its splines, and all functions of a layer before and after training."""
    config, figure = model.config, Figure((11, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    r = torch.linspace(max(0.0, config.first_knot - 0.5), config.cutoff + 0.3, 400, dtype=torch.float64)
    basis = model.splines.double().basis(r)
    axes[0].plot(r, basis, linewidth=0.9)
    axes[0].axvline(config.cutoff, color=GREY, linestyle=":")
    axes[0].set(title=f"{config.splines} B-splines, 0 at the cutoff", xlabel="r (Å)")
    weights = model.splines.coefficients.detach().double()
    axes[1].plot(r, basis * weights[:, 1], color=GREY, linewidth=0.7)
    axes[1].plot(r, basis @ weights[:, 1], color=BLUE)
    axes[1].set(title="one function: their weighted sum", xlabel="r (Å)")
    L, B = config.degree, config.groups
    start = facet.RadialSplines(B * (L + 1), config).double()
    axes[2].plot(r, start(r).detach().view(len(r), B, L + 1)[:, :, 1], color="0.8", linewidth=0.9)
    axes[2].plot(r, (basis @ weights).view(len(r), -1, B, L + 1)[:, 0, :, 1], linewidth=1.1)
    axes[2].set(title="layer 1, l = 1 (grey: untrained)", xlabel="r (Å)")
    save(figure, "splines")


def sum_first(model: facet.Facet) -> None:
    """Numbers stored and multiplications of one full layer, per atom, edge by edge and neighbours first."""
    config, K, figure = model.config, 46, Figure((11, 3.2), layout="constrained")
    L, C, B = config.degree, config.channels, config.groups
    M, density = (L + 1) ** 2, facet.Density(L, L, config)
    nonzero, out = int((density.G != 0).sum()), len(density.G)  # coupling coefficients; rows (path, m3)
    rows = {"edge by edge": (K * out * C, K * nonzero * C * 2), "neighbours first": (M * M * C, K * M * M * C + out * M * M * C)}
    for axis, column, title in zip(figure.subplots(1, 2), (0, 1), (
            "largest tensor, numbers per atom", "multiplications per atom, forward")):
        axis.barh(list(rows), [row[column] for row in rows.values()], color=[ORANGE, BLUE])
        axis.set_title(title)
        for y, row in enumerate(rows.values()):
            axis.text(row[column], y, f" {row[column]:,}", va="center")
        axis.set_xlim(0, 1.3 * max(row[column] for row in rows.values()))
    figure.suptitle(f"one layer: L = {L}, {C} channels, {B} groups, {K} neighbours, {len(density.paths)} paths. Neighbours first multiplies "
                    "as dense matrix products", fontsize=10)
    save(figure, "sum_first")


class Careless(facet.FacetCalculator):
    """Forces that are off by 1 %, differently each time."""

    def calculate(self, *arguments):
        super().calculate(*arguments)
        self.results["forces"] = self.results["forces"] * (1 + 0.01 * np.random.default_rng(int(1e6 * self.results["energy"]) % 2 ** 31).normal(size=(len(self.atoms), 3)))


def drift(model: facet.Facet) -> None:
    """Total energy in molecular dynamics: forces that are the gradient of the energy, and forces that are not quite."""
    figure = Figure((11, 3.2), layout="constrained")
    axis = figure.add_subplot()
    for calculator, colour, name in ((Careless, ORANGE, "forces off by 1 %, at random"), (facet.FacetCalculator, BLUE, "forces = −gradient of the energy")):
        atoms = ase.build.bulk("Cu", cubic=True, a=3.65) * (2, 2, 2)
        atoms.calc = calculator(model)
        atoms.set_velocities(np.random.default_rng(0).normal(size=(32, 3)) * np.sqrt(600 * units.kB / atoms.get_masses())[:, None])
        dynamics, energy = VelocityVerlet(atoms, 2 * units.fs), []
        dynamics.attach(lambda: energy.append(1000 * atoms.get_total_energy() / len(atoms)))
        dynamics.run(1000)
        time_ps = 0.002 * np.arange(len(energy))
        axis.plot(time_ps, np.array(energy) - energy[0], color=colour, label=f"{name}: {np.polyfit(time_ps, energy, 1)[0]:.2g} meV/atom/ps")
    axis.set(title="32 copper atoms, 300 K, steps of 2 fs", xlabel="time (ps)", ylabel="total energy (meV/atom)")
    axis.legend()
    save(figure, "drift")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=common.ROOT / "runs" / "emt" / "model.pt")
    path = parser.parse_args().model
    FIGURES.mkdir(exist_ok=True)
    harmonics()
    grid()
    for draw in (flow, feature, splines, sum_first, drift):
        draw(facet.load(path, dtype=torch.float64).requires_grad_(False))


if __name__ == "__main__":
    main()
