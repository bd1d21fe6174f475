"""Draw the pictures of the README's tour from the code itself, each for light and for dark pages (figures/NAME.png, NAME_dark.png).

    python train_small.py --name emt && python benchmarks/lesson.py --model runs/emt/model.pt        # two minutes
    python benchmarks/lesson.py --only grid errors                                                  # some of them

overview, flow, splines, harmonics, grid, sum_first, feature, errors, drift: shapes are read off the model, times off results/density.json.
"""
import argparse
from functools import cache
from pathlib import Path

import ase.build
import matplotlib
import numpy as np
import torch
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from scipy.spatial.transform import Rotation

from common import ROOT, read_results
from pictures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, draw, setting

import facet

VIEW = {"elev": 20, "azim": 30}  # degrees, of every sphere
GENERIC = 73.0, (0.3, 0.5, 0.8)  # degrees about an axis that is nothing special


# ─── Spheres ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def sphere(steps: int = 90) -> np.ndarray:
    """Directions on a net of angles, [steps, 2 steps, 3]."""
    theta, angle = np.meshgrid(np.linspace(0, np.pi, steps), np.linspace(0, 2 * np.pi, 2 * steps), indexing="ij")
    return np.stack([np.sin(theta) * np.cos(angle), np.sin(theta) * np.sin(angle), np.cos(theta)], -1)


def prepare(axis, zoom: float) -> None:
    axis.view_init(**VIEW)
    axis.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
    axis.set_box_aspect((1, 1, 1), zoom=zoom)
    axis.set_axis_off()
    axis.computed_zorder = False  # what is drawn later lies before


def draw_function(axis, value: np.ndarray, xyz: np.ndarray, lobes: bool, zoom: float = 1.5) -> None:
    """A function on the sphere: red where positive, blue where negative; as colours, or as lobes whose radius is its size."""
    size = np.abs(value).max()
    place = xyz * (np.abs(value) / size)[..., None] if lobes else xyz
    colours = matplotlib.colormaps["RdBu_r"](0.5 + 0.5 * (0.85 if lobes else 1) * value / size)
    axis.plot_surface(*np.moveaxis(place, -1, 0), facecolors=colours, rstride=1, cstride=1, shade=lobes, linewidth=0, antialiased=False)
    prepare(axis, zoom)


def in_front(points: np.ndarray) -> np.ndarray:
    """Which of the points [P, 3] the camera sees, [P]."""
    up, round_ = np.radians(VIEW["elev"]), np.radians(VIEW["azim"])
    return points @ [np.cos(up) * np.cos(round_), np.cos(up) * np.sin(round_), np.sin(up)] > 0.05


def draw_points(axis, degree: int, size: float) -> None:
    """Points of the Lebedev grid that is exact up to degree."""
    points = facet.lebedev(degree)[0].numpy()
    axis.scatter(*1.02 * points[in_front(points)].T, color="black", edgecolors="white", linewidths=0.5, s=size, depthshade=False, zorder=5)


# ─── What the model says ──────────────────────────────────────────────────────────────────────────────────────────────

def crystal_of(model: facet.Facet) -> Atoms:
    """Four rattled atoms of as many elements."""
    crystal = ase.build.bulk("Cu", "fcc", a=3.9, cubic=True)
    crystal.symbols = [model.config.species[i % len(model.config.species)] for i in range(4)]
    crystal.rattle(0.25, seed=1)
    return crystal


def inside(model: facet.Facet) -> dict[str, torch.Tensor]:
    """Features in the first layer's grid layer, [M, C] of the first atom: before, u, v (before its division), their product, after."""
    layer, seen = model.layers[0].grid, {}
    hook = layer.register_forward_hook(lambda _, inputs, out: seen.update(before=inputs[0][0], after=out[0]))
    batch = facet.make_batch([facet.find_neighbours(crystal_of(model), model.config)], model.config.cutoff, model.readout.dtype)
    model(batch)
    hook.remove()
    u, v = layer.W12(seen["before"][None]).chunk(2, -1)  # 2 × [1, M, C]
    seen |= {"u": u[0], "v": v[0], "product": layer.from_grid(layer.on_grid(u) * layer.on_grid(v))[0]}
    return {name: x.detach() for name, x in seen.items()}


@cache  # every picture is drawn twice, on light and on dark
def layer_error(kind: type, L: int, grid_degree: int, degrees: float, axis: tuple[float, float, float]) -> tuple[int, float]:
    """Points of the grid, and the layer's relative error under a rotation, for random weights and features."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = kind(L, facet.Config(("Si",), channels=16, grid_degree=grid_degree)).double().requires_grad_(False)
    x = torch.randn(50, (L + 1) ** 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    R = Rotation.from_rotvec(degrees * np.array(axis) / np.linalg.norm(axis), degrees=True).as_matrix()
    D = facet.rotation_of_rows(torch.from_numpy(R), L)
    return len(layer.to_grid), float((D @ layer(x) - layer(D @ x)).norm() / (layer(x) - x).norm())


def radial_functions(model: facet.Facet, r: torch.Tensor) -> torch.Tensor:
    """Of the first layer for l = 1, one per group, [n, B]."""
    config = model.config
    return model.splines(r).detach().view(len(r), config.layers, config.groups, config.degree + 1)[:, 0, :, 1]


# ─── The pictures, in the order of the tour ───────────────────────────────────────────────────────────────────────────

def overview(figure: Figure, model: facet.Facet) -> None:
    """Learned splines, one atom's feature with the grid's points, equivariance error against points."""
    left, right = figure.add_subplot(131), figure.add_subplot(133)
    r = torch.linspace(model.config.first_knot, model.config.cutoff, 300, dtype=torch.float64)
    left.plot(r, radial_functions(model, r))
    left.axhline(0, color=setting("grid.color"), linewidth=0.8, zorder=0)
    left.set(title="learned splines", xlabel="r (Å)")
    axis, after = figure.add_subplot(132, projection="3d"), inside(model)["after"]
    value = facet.harmonics(torch.from_numpy(sphere()), model.config.degree) @ after[:, after[1:].norm(dim=0).argmax()]
    draw_function(axis, (value - value.mean()).numpy(), sphere(), lobes=False, zoom=1.3)
    draw_points(axis, 3 * model.config.degree, 20)
    axis.set_title("a feature on its 26 points")
    draw_errors(right, (2,))
    right.legend()
    right.set_title("error under rotation")


def flow(figure: Figure, model: facet.Facet) -> None:
    """What goes through the network, with the sizes of this model; the second layer once more, in detail."""
    axis, layer = figure.add_subplot(), model.layers[1]
    C, rows, (R, count) = model.config.channels, len(layer.density.degree_of_row), model.splines.coefficients.shape
    page = setting("axes.facecolor")

    def box(x, y, width, height, text, colour):
        axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.15", facecolor=page, edgecolor=colour, linewidth=1.6))
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.4, linespacing=1.35)

    def arrow(x0, y0, x1, y1):
        axis.add_patch(FancyArrowPatch((x0, y0), (x1, y1), arrowstyle="-|>", mutation_scale=9, color=GREY, linewidth=1.1, shrinkA=0, shrinkB=0))

    def label(x, y, text):
        axis.text(x, y, text, ha="center", va="bottom", fontsize=8, color=GREY)
    box(0, 4.9, 1.8, 1.2, "crystal\nN atoms", ORANGE)
    for y, text in ((6.1, f"{count} splines φ\nof {R} numbers"), (4.95, f"harmonics Y\n{rows} per neighbour"), (3.8, f"embedded species\n[N, 1, {C}]")):
        box(2.5, y, 2.5, 0.95, text, BLUE)
        arrow(1.85, 5.5, 2.45, y + 0.47)
    places = [6.4 + 2.7 * t for t in range(len(model.layers))]
    axis.plot([5.05, 5.5, 5.5], [6.57, 6.57, 5.42], color=GREY, linewidth=1.1)
    axis.plot([5.05, 5.5], [5.42, 5.42], color=GREY, linewidth=1.1)
    axis.plot([5.5, 5.5, places[-1] + 0.75], [6.57, 6.75, 6.75], color=GREY, linewidth=1.1)
    label((5.5 + places[-1] + 0.75) / 2, 6.85, "φ: other functions for each layer; Y: the same for all")
    axis.plot([5.05, 5.75, 5.75], [4.27, 4.27, 4.9], color=GREY, linewidth=1.1)
    arrow(5.75, 4.9, 6.35, 4.9)
    for t, (x, one) in enumerate(zip(places, model.layers)):
        box(x, 4.4, 1.5, 1.6, f"layer {t + 1}\n{len(one.density.paths)} paths\n{len(one.grid.to_grid)} points", PURPLE)
        arrow(x + 0.75, 6.75, x + 0.75, 6.05)
        arrow(x + 1.55, 4.9, x + 2.65, 4.9)
        label(x + 2.08, 4.98, f"[N, {one.grid.to_grid.shape[1]}, {C}]")
    box(places[-1] + 2.7, 4.4, 1.9, 1.6, "energy\n↓ one gradient\nforces, stress", GREEN)
    for corner, end in ((places[1], 0), (places[1] + 1.5, 16.25)):
        axis.plot([corner, end], [4.4, 2.95], color=setting("grid.color"), linewidth=1, linestyle="--", zorder=0)
    shapes = [tuple(W.shape) for W in layer.mix.W]
    counts, points = ", ".join(map(str, layer.density.counts)), len(layer.grid.to_grid)
    steps = (("sum over neighbours\nof φ · Y · h", f"[N, {layer.density.G.shape[1]}, {C}]"),
             (f"couple: {counts}\npaths to l = 0, 1, 2", f"[N, {len(layer.density.G)}, {C}]"),
             ("mix: a matrix per l\n" + ", ".join(f"{a}×{b}" for a, b in shapes), f"[N, {rows}, {C}]"), ("add the skip\nconnection", f"[N, {rows}, {C}]"),
             (f"grid: u · v on\n{points} points, back", f"[N, {rows}, {C}]"))
    widths, x = (3.0, 2.8, 3.3, 2.0, 2.55), 0.0
    for i, ((text, shape), width) in enumerate(zip(steps, widths)):
        box(x, 1.3, width, 1.3, text, PURPLE)
        label(x + width / 2, 0.85, shape)
        if i:
            arrow(x - 0.6, 1.95, x - 0.05, 1.95)
        x += width + 0.65
    axis.text(0, 2.75, "layer 2, step by step, and what comes out:", fontsize=8.4, color=GREY)
    axis.set(xlim=(-0.1, 16.5), ylim=(0.6, 7.3))
    axis.set_axis_off()


def splines(figure: Figure, model: facet.Facet) -> None:
    """The basis; one function as a sum of its splines; how it ends; the functions of a layer before and after training."""
    config, axes = model.config, figure.subplots(2, 2).flat
    h = (config.cutoff - config.first_knot) / config.splines
    r = torch.linspace(max(0.0, config.first_knot - 0.4), config.cutoff + 0.3, 500, dtype=torch.float64, requires_grad=True)
    basis, x = model.splines.basis(r), r.detach()
    for k in range(config.splines):
        axes[0].plot(x, basis[:, k].detach(), linewidth=1, color=BLUE if k % 2 else GREY)
    axes[0].set(title=f"{config.splines} B-splines, {h:.2f} Å apart")
    weights = model.splines.coefficients.detach()[:, 1]  # layer 1, group 1, l = 1
    axes[1].plot(x, (basis * weights).detach(), color=GREY, linewidth=0.8)
    axes[1].plot(x, (basis @ weights).detach(), color=BLUE, linewidth=2.2)
    axes[1].set(title="one radial function: their weighted sum")
    curve, last = basis[:, -1], x > config.cutoff - 5 * h
    for colour, name, scale in ((BLUE, "value", 1), (ORANGE, "slope", h), (RED, "curvature", h * h)):
        axes[2].plot(x[last], scale * curve.detach()[last], color=colour, label=name)
        curve, = torch.autograd.grad(curve.sum(), r, create_graph=True)
    axes[2].set(title="the last spline: it ends by itself", xlabel="r (Å)")
    axes[2].legend(loc="lower left")
    fresh = facet.RadialSplines(config.groups * (config.degree + 1), config).double()
    before = fresh(x).detach().view(len(r), config.groups, -1)[:, :, 1]
    for b, (old, new) in enumerate(zip(before.T, radial_functions(model, x).T)):
        axes[3].plot(x, old, ":", color=f"C{b}", linewidth=0.9)
        axes[3].plot(x, new, color=f"C{b}", linewidth=1.3)
    axes[3].set(title="a layer's functions for l = 1 (dotted: untrained)", xlabel="r (Å)")
    for axis in axes:
        axis.axvline(config.cutoff, color=GREY, linestyle="--", linewidth=0.8)
        axis.axhline(0, color=setting("grid.color"), linewidth=0.8, zorder=0)
    axes[1].annotate("cutoff ", (config.cutoff, 2.6), ha="right", color=GREY)


def harmonics(figure: Figure) -> None:
    """Y_lm up to l = 3 as lobes."""
    xyz = sphere(60)
    Y = facet.harmonics(torch.from_numpy(xyz), 3).numpy()
    for l in range(4):
        for m in range(-l, l + 1):
            axis = figure.add_subplot(4, 7, 7 * l + 4 + m, projection="3d")
            draw_function(axis, Y[..., l * l + l + m], xyz, lobes=True, zoom=1.5 if l else 0.9)
            axis.set_title(f"l = {l}, m = {m}".replace("-", "−"), fontsize=9, y=1.02)


def grid(figure: Figure) -> None:
    """The 26 points, their weights, and the rotations that cannot tell a good layer from a bad one."""
    points, weights = (x.numpy() for x in facet.lebedev(6))
    axes = {"a 4-fold axis": ((0, 0, 1), RED), "a 3-fold axis": ((1, 1, 1), GREEN), "a 2-fold axis": ((0, 1, 1), PURPLE)}
    axis = figure.add_subplot(121, projection="3d")
    axis.plot_surface(*np.moveaxis(0.98 * sphere(40), -1, 0), color=setting("grid.color"), shade=False, antialiased=False)
    prepare(axis, 1.25)
    for weight, colour in zip(sorted(set(weights.round(12))), (GREEN, PURPLE, RED)):
        alike = np.isclose(weights, weight)
        shown = points[alike & in_front(points)]
        axis.scatter(*shown.T, s=5000 * weight, color=colour, depthshade=False, zorder=4, label=f"{alike.sum()} points of weight {weight:.4f}")
    for direction, colour in axes.values():
        end = np.array(direction) / np.linalg.norm(direction)
        axis.plot(*np.stack([end, 1.45 * end], 1), color=colour, linewidth=2, zorder=3)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 0.03), frameon=False, markerscale=0.5)
    axis.set_title("26 points; an axis of each kind")
    curve, angles = figure.add_subplot(122), np.arange(0, 181, 3)
    for name, (about, colour) in {**axes, "no such axis": (GENERIC[1], ORANGE)}.items():
        error = [layer_error(facet.SiluGrid, 2, 6, float(angle), about)[1] for angle in angles]
        curve.semilogy(angles, np.maximum(error, 1e-17), color=colour, label=f"SiLU, about {name}")
    error = [layer_error(facet.ProductGrid, 2, 6, float(angle), GENERIC[1])[1] for angle in angles]
    curve.semilogy(angles, np.maximum(error, 1e-17), color=BLUE, linewidth=2.2, label="product, about no such axis")
    curve.set(title="error on this grid under rotation", xlabel="angle (°)", ylabel="relative error", xticks=range(0, 181, 30))
    curve.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False, columnspacing=1)


def sum_first(figure: Figure) -> None:
    """What both orders of summation store and multiply in one layer, and what they take, from benchmarks/results/density.json."""
    results = read_results("density")
    config = facet.Config(("Si",), channels=64)
    L, C, K = config.degree, config.channels, round(results["mean_neighbours"])
    M, density = (L + 1) ** 2, facet.Density(L, L, config)
    out, couplings = len(density.G), int((density.G != 0).sum())  # rows (path, m3); coefficients that are not zero
    layer = results["threads"]["1"]["layer"]
    panels = {"largest tensor, numbers per atom": (K * out * C, M * M * C), "multiplications per atom": (2 * K * couplings * C, K * M * M * C + out * M * M * C),
              "ms, energy and forces": [layer["energy+forces"][name] for name in ("edge_wise_ms", "density_ms")],
              "ms, training step": [layer["training step"][name] for name in ("edge_wise_ms", "density_ms")]}
    left, *axes = figure.subplot_mosaic([["shapes", name] for name in "abcd"], width_ratios=(1, 1.2)).values()
    for x, width, height, text, colour in ((0, K, out, f"edge by edge\n{K} neighbours\n× {out} (path, m)", ORANGE),
                                           (75, M, M, f"neighbours first\n{M} × {M} (m, m')", BLUE)):
        left.add_patch(Rectangle((x, 0), width, height, color=colour))
        left.text(x, -3, text, va="top", fontsize=9)
    left.set(xlim=(-2, 110), ylim=(-35, 50), aspect="equal", title="what is stored, to scale, per channel")
    left.set_axis_off()
    for axis, (title, values) in zip(axes, panels.items()):
        bars = axis.barh([1, 0], values, color=[ORANGE, BLUE], height=0.8)
        axis.bar_label(bars, [f" {value:,.0f}" for value in values])
        axis.set_title(title, fontsize=10, loc="left")
        axis.set(yticks=[], xticks=[], xlim=(0, 1.25 * max(values)))
        axis.spines[:].set_visible(False)


def feature(figure: Figure, model: facet.Facet) -> None:
    """What the grid layer does to one channel of one atom, as functions on the sphere."""
    seen, xyz = inside(model), sphere()
    Y = facet.harmonics(torch.from_numpy(xyz), model.config.degree)

    def roundness(x):
        return x[0].abs() / x[1:].norm(dim=0)
    channel = int(sum(roundness(seen[name]) for name in ("u", "v", "product")).argmin())  # the one with most to see
    before, after = seen["before"][1:], seen["after"][1:]
    clear = roundness(seen["before"]) < roundness(seen["before"]).median()
    changed = int(torch.where(clear, torch.cosine_similarity(before, after, dim=0), 1.0).argmin())
    for i, (name, c, title) in enumerate((("before", changed, "before"), ("u", channel, "u = x W₁"), ("v", channel, "v = x W₂"),
                                          ("product", channel, "u · v, projected"), ("after", changed, "after: x + f"))):
        axis = figure.add_subplot(1, 5, i + 1, projection="3d")
        draw_function(axis, (Y @ seen[name][:, c]).numpy(), xyz, lobes=False, zoom=1.45)
        if name in "uv":
            draw_points(axis, 3 * model.config.degree, 8)
        axis.set_title(title, fontsize=10)


def draw_errors(axis, degrees: tuple[int, ...]) -> None:
    """Error of both grid layers under a generic rotation against points of the grid, one line per degree L of the features."""
    for kind, colour, name in ((facet.SiluGrid, ORANGE, "SiLU (paper)"), (facet.ProductGrid, BLUE, "product")):
        for L, line in zip(degrees, ("-", "--", ":")):
            points, error = zip(*[layer_error(kind, L, exact, *GENERIC) for exact in (3, *range(5, 30, 2))])
            axis.loglog(points, error, line, marker="o", color=colour, markersize=3.5, label=name + f", L = {L}" * (len(degrees) > 1))
    axis.set(xlabel="grid points", xticks=[6, 14, 26, 50, 86, 146, 302], xticklabels=["6", "14", "26", "50", "86", "146", "302"])
    axis.minorticks_off()


def errors(figure: Figure) -> None:
    """Error under rotation against grid points, for L = 1, 2, 3."""
    axis = figure.add_subplot()
    draw_errors(axis, (1, 2, 3))
    axis.set(title="error of a grid layer under a generic rotation, random weights", ylabel="relative error")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(linewidth=0.5)


class Turned(facet.FacetCalculator):
    """Forces turned about z by 0.57°: wrong by one percent, and not the gradient of anything."""

    def calculate(self, *arguments):
        super().calculate(*arguments)
        x, y, z = self.results["forces"].T
        self.results["forces"] = np.stack([x - 0.01 * y, y + 0.01 * x, z], 1)


@cache
def total_energy(calculator: type, model: facet.Facet) -> tuple[np.ndarray, np.ndarray]:
    """Molecular dynamics of copper: ps, and the change of the total energy in meV/atom."""
    atoms = ase.build.bulk("Cu", cubic=True, a=3.65) * (2, 2, 2)
    atoms.calc = calculator(model)
    atoms.set_velocities(np.random.default_rng(0).normal(size=(32, 3)) * np.sqrt(600 * units.kB / atoms.get_masses())[:, None])
    dynamics, energy = VelocityVerlet(atoms, 2 * units.fs), []
    dynamics.attach(lambda: energy.append(1000 * atoms.get_total_energy() / len(atoms)))
    dynamics.run(2000)
    return 0.002 * np.arange(len(energy)), np.array(energy) - energy[0]


def drift(figure: Figure, model: facet.Facet) -> None:
    """Total energy in molecular dynamics: forces that are the gradient of the energy, and forces that are not quite."""
    axis = figure.add_subplot()
    for calculator, colour, name in ((Turned, ORANGE, "forces turned by 0.6°, an error of 1 %"), (facet.FacetCalculator, BLUE, "forces = −gradient of the energy")):
        ps, energy = total_energy(calculator, model)
        axis.plot(ps, energy, color=colour, label=f"{name}: {np.polyfit(ps, energy, 1)[0]:.1g} meV/atom/ps")
    axis.set(title="32 copper atoms, 300 K, steps of 2 fs", xlabel="time (ps)", ylabel="change of energy (meV/atom)")
    axis.grid(linewidth=0.5)
    axis.legend()


PICTURES = {overview: 3.0, flow: 4.1, splines: 4.8, harmonics: 5.2, grid: 4.1, sum_first: 3.2, feature: 2.2, errors: 3.2, drift: 2.9}  # heights


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "emt" / "model.pt")
    parser.add_argument("--only", nargs="+", choices=[paint.__name__ for paint in PICTURES])
    args = parser.parse_args()
    model = cache(lambda: facet.load(args.model, dtype=torch.float64).requires_grad_(False))  # loaded once, if it is needed
    for paint, height in PICTURES.items():
        if not args.only or paint.__name__ in args.only:
            draw(paint.__name__, height, paint, *([model()] if "model" in paint.__annotations__ else []))


if __name__ == "__main__":
    main()
