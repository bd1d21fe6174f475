"""Draw the pictures of lesson/README.md from the code itself, into lesson/figures/.

    python train_small.py && python lesson/draw.py --model runs/emt/model.pt
    python lesson/draw.py --only grid errors          # some of them; these two need no model

A minute or two on one core. It trains nothing; the trained model lends its radial functions, its
features and its forces. Each picture has a transparent background and grey letters, so that it can
be read on a light page and on a dark one.
"""
import argparse
import json
import sys
from functools import cache
from pathlib import Path

import ase.build
import ase.spacegroup
import matplotlib
import numpy as np
import torch
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from scipy.spatial.transform import Rotation

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # facet.py is not installed

import facet  # noqa: E402
from tools import properties  # noqa: E402

FIGURES = ROOT / "lesson" / "figures"
WIDTH = 9.0  # inches; a page shows it at about 100 dots per inch, so 10 points stay readable

# Colours of medium lightness, for light and dark pages
BLUE, ORANGE, GREEN, RED = "#3a86d8", "#e07b20", "#35a058", "#e0524d"
PURPLE, BROWN, PINK, GREY = "#9a70dd", "#b08430", "#d45c9e", "#808080"
COLOURS = [BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, PINK, GREY]
FAINT = "#80808060"

STYLE = {
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": FAINT,
    "legend.frameon": False,
    "axes.facecolor": "none",
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "axes.titlesize": 11,
    "legend.fontsize": 9,
    "lines.linewidth": 1.5,
    "axes.linewidth": 0.8,
    "grid.linewidth": 0.5,
    "savefig.dpi": 160,
    "savefig.transparent": True,
}

VIEW = {"elev": 20, "azim": 30}  # degrees, of every sphere
GENERIC = (0.3, 0.5, 0.8)        # an axis that is nothing special
ANGLE = 73.0                     # degrees about it


# ─── Spheres ──────────────────────────────────────────────────────────────────────────────────────


def sphere(steps: int = 90) -> np.ndarray:
    """Directions on a net of angles, [steps, 2 steps, 3]."""
    polar = np.linspace(0, np.pi, steps)
    azimuth = np.linspace(0, 2 * np.pi, 2 * steps)
    polar, azimuth = np.meshgrid(polar, azimuth, indexing="ij")
    x = np.sin(polar) * np.cos(azimuth)
    y = np.sin(polar) * np.sin(azimuth)
    return np.stack([x, y, np.cos(polar)], -1)


def prepare(axis, zoom: float) -> None:
    """A box without axes, seen from VIEW."""
    axis.view_init(**VIEW)
    axis.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
    axis.set_box_aspect((1, 1, 1), zoom=zoom)
    axis.set_axis_off()
    axis.computed_zorder = False  # what is drawn later lies before


def draw_function(axis, value: np.ndarray, xyz: np.ndarray, lobes: bool, zoom: float) -> None:
    """A function on the sphere, red where positive, blue where negative.

    As colours, or as lobes whose radius is the function's size.
    """
    size = np.abs(value).max()
    strength = 0.85 if lobes else 1.0
    colours = matplotlib.colormaps["RdBu_r"](0.5 + 0.5 * strength * value / size)
    place = xyz * (np.abs(value) / size)[..., None] if lobes else xyz
    x, y, z = np.moveaxis(place, -1, 0)
    axis.plot_surface(x, y, z, facecolors=colours, rstride=1, cstride=1, shade=lobes,
                      linewidth=0, antialiased=False)
    prepare(axis, zoom)


def in_front(points: np.ndarray) -> np.ndarray:
    """Which of the points [P, 3] the camera sees, [P]."""
    up = np.radians(VIEW["elev"])
    around = np.radians(VIEW["azim"])
    towards = [np.cos(up) * np.cos(around), np.cos(up) * np.sin(around), np.sin(up)]
    return points @ towards > 0.05


def draw_points(axis, exact_degree: int, size: float) -> None:
    """Points of the Lebedev grid that is exact up to exact_degree."""
    points = facet.lebedev(exact_degree)[0].numpy()
    x, y, z = 1.02 * points[in_front(points)].T
    axis.scatter(x, y, z, color="black", edgecolors="white", linewidths=0.5, s=size,
                 depthshade=False, zorder=5)


# ─── What the model says ──────────────────────────────────────────────────────────────────────────


def crystal_of(model: facet.Facet) -> ase.Atoms:
    """Four rattled atoms of as many elements as the model knows."""
    species = model.config.species
    crystal = ase.build.bulk("Cu", "fcc", a=3.9, cubic=True)
    crystal.symbols = [species[i % len(species)] for i in range(4)]
    crystal.rattle(0.25, seed=1)
    return crystal


def inside(model: facet.Facet) -> dict[str, torch.Tensor]:
    """The first layer's grid layer at work on one atom, features [M, C] by name.

    before, u, v (not yet divided by its length), their product, after.
    """
    grid_layer = model.layers[0].grid
    seen = {}

    def keep(layer, inputs, output):
        seen["before"] = inputs[0][:1]
        seen["after"] = output[:1]

    hook = grid_layer.register_forward_hook(keep)
    facet.evaluate(model, [facet.find_neighbours(crystal_of(model), model.config)])
    hook.remove()

    u, v = grid_layer.W12(seen["before"]).chunk(2, -1)  # 2 × [1, M, C]
    product = grid_layer.on_grid(u) * grid_layer.on_grid(v)  # [P, 1, C]
    seen["u"] = u
    seen["v"] = v
    seen["product"] = grid_layer.from_grid(product) / grid_layer.spread
    return {name: feature[0].detach() for name, feature in seen.items()}


@cache
def random_layer(kind: type, L: int, exact_degree: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """A grid layer with random weights, and random features for it [N, M, C]."""
    config = facet.Config(("Si",), channels=16, grid_degree=exact_degree)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = kind(L, config).double().requires_grad_(False)
        x = torch.randn(50, (L + 1) ** 2, 16, dtype=torch.float64)  # [N, M, C]
    return layer, x


def layer_error(kind: type, L: int, exact_degree: int, degrees: float, axis) -> tuple[int, float]:
    """Points of a grid layer, and its relative error under a rotation; all weights random."""
    layer, x = random_layer(kind, L, exact_degree)
    axis = np.array(axis) / np.linalg.norm(axis)
    R = Rotation.from_rotvec(degrees * axis, degrees=True).as_matrix()
    turn = properties.wigner(torch.from_numpy(R), L)  # [M, M]
    error = (turn @ layer(x) - layer(turn @ x)).norm() / (layer(x) - x).norm()
    return len(layer.to_grid), float(error)


def first_layer(splines: facet.RadialSplines, config: facet.Config, r: torch.Tensor):
    """The first layer's radial functions for l = 1 at r [n], one per group: [n, B]."""
    phi = splines(r).detach()
    return phi.view(len(r), -1, config.groups, config.degree + 1)[:, 0, :, 1]


# ─── The pictures, in the order of the tour ───────────────────────────────────────────────────────


def overview(figure: Figure, model: facet.Facet) -> None:
    """The front page: learned splines, a feature on its grid, the error under rotation."""
    config = model.config
    left = figure.add_subplot(131)
    middle = figure.add_subplot(132, projection="3d")
    right = figure.add_subplot(133)

    r = torch.linspace(config.first_knot, config.cutoff, 300, dtype=torch.float64)
    left.plot(r, first_layer(model.splines, config, r))
    left.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    left.set(title="learned splines", xlabel="r (Å)")

    # the channel with most to see, without its mean
    after = inside(model)["after"]
    channel = after[1:].norm(dim=0).argmax()
    Y = facet.harmonics(torch.from_numpy(sphere()), config.degree)
    value = Y @ after[:, channel]
    draw_function(middle, (value - value.mean()).numpy(), sphere(), lobes=False, zoom=1.3)
    draw_points(middle, 3 * config.degree, 20)
    middle.set_title(f"a feature on its {len(facet.lebedev(3 * config.degree)[0])} points")

    draw_errors(right, (2,))
    right.legend()
    right.set_title("error under rotation")


def flow(figure: Figure, model: facet.Facet) -> None:
    """What goes through the network, with this model's sizes; the second layer in detail."""
    axis = figure.add_subplot()
    C = model.config.channels
    R, count = model.splines.coefficients.shape
    layer = model.layers[1]
    M = layer.density.of_degree.shape[1]

    def box(x, y, width, height, text, colour):
        outline = FancyBboxPatch((x, y), width, height, facecolor="none", edgecolor=colour,
                                 boxstyle="round,pad=0,rounding_size=0.15", linewidth=1.6)
        axis.add_patch(outline)
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.4,
                  linespacing=1.35)

    def arrow(x0, y0, x1, y1):
        axis.add_patch(FancyArrowPatch((x0, y0), (x1, y1), arrowstyle="-|>", mutation_scale=9,
                                       color=GREY, linewidth=1.1, shrinkA=0, shrinkB=0))

    def line(x, y):
        axis.plot(x, y, color=GREY, linewidth=1.1)

    def label(x, y, text):
        axis.text(x, y, text, ha="center", va="bottom", fontsize=8)

    # Inputs
    box(0, 4.9, 1.8, 1.2, "crystal\nN atoms", ORANGE)
    inputs = {
        6.1: f"{count} splines φ\nof {R} numbers",
        4.95: f"harmonics Y\n{M} per neighbour",
        3.8: f"embedded species\n[N, 1, {C}]",
    }
    for y, text in inputs.items():
        box(2.5, y, 2.5, 0.95, text, BLUE)
        arrow(1.85, 5.5, 2.45, y + 0.47)

    # Layers; φ and Y come from above, features from the left
    places = [6.4 + 2.7 * t for t in range(len(model.layers))]
    last = places[-1]
    line([5.05, 5.5, 5.5], [6.57, 6.57, 5.42])
    line([5.05, 5.5], [5.42, 5.42])
    line([5.5, 5.5, last + 0.75], [6.57, 6.75, 6.75])
    label((6.25 + last) / 2, 6.85, "φ: other functions for each layer; Y: the same for all")
    line([5.05, 5.75, 5.75], [4.27, 4.27, 4.9])
    arrow(5.75, 4.9, 6.35, 4.9)
    for t, (x, one) in enumerate(zip(places, model.layers)):
        P, rows = one.grid.to_grid.shape
        points = f"{P} points" if P > 1 else "1 point"
        box(x, 4.4, 1.5, 1.6, f"layer {t + 1}\n{len(one.density.paths)} paths\n{points}", PURPLE)
        arrow(x + 0.75, 6.75, x + 0.75, 6.05)
        arrow(x + 1.55, 4.9, x + 2.65, 4.9)
        label(x + 2.08, 4.98, f"[N, {rows}, {C}]")
    box(last + 2.7, 4.4, 1.9, 1.6, "energy\n↓ one gradient\nforces, stress", GREEN)

    # The second layer, enlarged
    for corner, end in ((places[1], 0), (places[1] + 1.5, 16.25)):
        axis.plot([corner, end], [4.4, 2.95], color=FAINT, linewidth=1, linestyle="--", zorder=0)
    matrices = ", ".join(f"{W.shape[0]}×{W.shape[1]}" for W in layer.mix.W)
    counts = ", ".join(str(Q) for Q in layer.density.counts)
    degrees = ", ".join(str(l) for l in range(len(layer.density.counts)))
    steps = [
        (3.0, "sum over neighbours\nof φ · Y · h", f"[N, {layer.density.G.shape[1]}, {C}]"),
        (2.8, f"couple: {counts}\npaths to l = {degrees}", f"[N, {len(layer.density.G)}, {C}]"),
        (3.3, f"mix: a matrix per l\n{matrices}", f"[N, {M}, {C}]"),
        (2.0, "add the skip\nconnection", f"[N, {M}, {C}]"),
        (2.55, f"grid: u · v on\n{len(layer.grid.to_grid)} points, back", f"[N, {M}, {C}]"),
    ]
    x = 0.0
    for width, text, shape in steps:
        box(x, 1.3, width, 1.3, text, PURPLE)
        label(x + width / 2, 0.85, shape)
        if x > 0:
            arrow(x - 0.6, 1.95, x - 0.05, 1.95)
        x += width + 0.65
    axis.text(0, 2.75, "layer 2, step by step, and what comes out:", fontsize=8.4)
    axis.set(xlim=(-0.1, 16.5), ylim=(0.6, 7.3))
    axis.set_axis_off()


def splines(figure: Figure, model: facet.Facet) -> None:
    """The basis; one function as a sum of bumps; how it ends; a layer's functions."""
    config = model.config
    basis_axis, sum_axis, end_axis, layer_axis = figure.subplots(2, 2).flat
    spacing = model.splines.spacing
    start = max(0.0, config.first_knot - 0.4)
    r = torch.linspace(start, config.cutoff + 0.3, 500, dtype=torch.float64, requires_grad=True)
    basis = model.splines.basis(r)  # [n, R]
    x = r.detach()

    for k in range(config.splines):
        colour = BLUE if k % 2 else GREY
        basis_axis.plot(x, basis[:, k].detach(), linewidth=1, color=colour)
    basis_axis.set(title=f"{config.splines} bumps, {spacing:.2f} Å apart")

    weights = model.splines.coefficients.detach()[:, 1]  # [R] layer 1, group 1, l = 1
    sum_axis.plot(x, (basis * weights).detach(), color=GREY, linewidth=0.8)
    sum_axis.plot(x, (basis @ weights).detach(), color=BLUE, linewidth=2.2)
    sum_axis.set(title="one radial function: their weighted sum")
    sum_axis.annotate("cutoff ", (config.cutoff, 0.93), xycoords=("data", "axes fraction"),
                      ha="right")

    curve = basis[:, -1]
    shown = x > config.cutoff - 5 * spacing
    for colour, name, scale in ((BLUE, "value", 1), (ORANGE, "slope", spacing),
                                (RED, "curvature", spacing ** 2)):
        end_axis.plot(x[shown], scale * curve.detach()[shown], color=colour, label=name)
        curve, = torch.autograd.grad(curve.sum(), r, create_graph=True)
    end_axis.set(title="the last bump: it ends by itself", xlabel="r (Å)")
    end_axis.legend(loc="lower left")

    fresh = facet.RadialSplines(config.groups * (config.degree + 1), config)
    before = first_layer(fresh, config, x)
    after = first_layer(model.splines, config, x)
    for b, colour in zip(range(config.groups), COLOURS):
        layer_axis.plot(x, before[:, b], ":", color=colour, linewidth=0.9)
        layer_axis.plot(x, after[:, b], color=colour, linewidth=1.3)
    layer_axis.set(title="a layer's functions for l = 1 (dotted: untrained)", xlabel="r (Å)")

    for axis in (basis_axis, sum_axis, end_axis, layer_axis):
        axis.axvline(config.cutoff, color=GREY, linestyle="--", linewidth=0.8)
        axis.axhline(0, color=FAINT, linewidth=0.8, zorder=0)


def harmonics(figure: Figure) -> None:
    """Y_lm up to l = 3 as lobes."""
    xyz = sphere(60)
    Y = facet.harmonics(torch.from_numpy(xyz), 3).numpy()
    for l in range(4):
        for m in range(-l, l + 1):
            axis = figure.add_subplot(4, 7, 7 * l + 4 + m, projection="3d")
            draw_function(axis, Y[..., l * l + l + m], xyz, lobes=True, zoom=1.5 if l else 0.9)
            axis.set_title(f"l = {l}, m = {m}".replace("-", "−"), fontsize=9, y=1.02)


def chiral(figure: Figure) -> None:
    """A chain of left and of right selenium from the side: the nearer a bond, the bolder."""
    for place, (group, z, name) in enumerate(((152, 1 / 3, "P3₁21"), (154, 2 / 3, "P3₂21"))):
        cell = [4.37, 4.37, 4.95, 90, 90, 120]
        crystal = ase.spacegroup.crystal("Se", [(0.225, 0, z)], spacegroup=group, cellpar=cell)
        order = np.argsort(crystal.positions[:, 2])
        bonds = [crystal.get_distance(order[i], order[(i + 1) % 3], mic=True, vector=True)
                 for i in range(3)]
        steps = np.concatenate([np.zeros((1, 3)), np.tile(bonds, (4, 1))])
        atoms = np.cumsum(steps, 0)  # [13, 3]
        atoms[:, :2] -= atoms[:3, :2].mean(0)  # the axis of the screw
        atoms = atoms @ Rotation.from_euler("z", 20, degrees=True).as_matrix().T  # [13, 3]

        # The page is (z, x); y points away from the reader
        axis = figure.add_subplot(1, 2, place + 1)
        for a, b in zip(atoms[:-1], atoms[1:], strict=True):
            depth = (a[1] + b[1]) / 2  # Å
            axis.plot([a[2], b[2]], [a[0], b[0]], color=BLUE, linewidth=3.5 - 5 * depth,
                      zorder=-depth)
        axis.plot(atoms[:, 2], atoms[:, 0], "o", color=ORANGE, markersize=11, zorder=3)
        axis.axhline(0, color=GREY, linestyle="--", linewidth=0.8, zorder=0)
        axis.set(title=name, aspect="equal", ylim=(-1.8, 1.8))
        axis.set_axis_off()


def grid(figure: Figure) -> None:
    """The 26 points, their weights, and the rotations that the grid is blind to."""
    points, weights = facet.lebedev(6)
    points = points.numpy()
    weights = weights.numpy()
    axes = {
        "a 4-fold axis": ((0, 0, 1), RED),
        "a 3-fold axis": ((1, 1, 1), GREEN),
        "a 2-fold axis": ((0, 1, 1), PURPLE),
        "no such axis": (GENERIC, ORANGE),
    }

    # Left: the sphere
    left = figure.add_subplot(121, projection="3d")
    x, y, z = np.moveaxis(0.98 * sphere(40), -1, 0)
    left.plot_surface(x, y, z, color="#b4b8bd", shade=False, antialiased=False)
    prepare(left, 1.25)
    for weight, colour in zip(sorted(set(weights.round(12))), (GREEN, PURPLE, RED)):
        alike = np.isclose(weights, weight)
        x, y, z = points[alike & in_front(points)].T
        left.scatter(x, y, z, s=5000 * weight, color=colour, depthshade=False, zorder=4,
                     label=f"{alike.sum()} points of weight {weight:.4f}")
    for direction, colour in axes.values():
        if direction != GENERIC:
            end = np.array(direction) / np.linalg.norm(direction)
            x, y, z = np.stack([end, 1.45 * end], 1)
            left.plot(x, y, z, color=colour, linewidth=2, zorder=3)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, 0.03), markerscale=0.5)
    left.set_title("26 points; an axis of each kind")

    # Right: the errors
    right = figure.add_subplot(122)
    angles = np.arange(0, 181, 3.0)
    for name, (direction, colour) in axes.items():
        error = [layer_error(facet.SiluGrid, 2, 6, angle, direction)[1] for angle in angles]
        right.semilogy(angles, np.maximum(error, 1e-17), color=colour, label=f"SiLU, about {name}")
    error = [layer_error(facet.ProductGrid, 2, 6, angle, GENERIC)[1] for angle in angles]
    right.semilogy(angles, np.maximum(error, 1e-17), color=BLUE, linewidth=2.2,
                   label="product, about no such axis")
    right.set(title="error on this grid under rotation", xlabel="angle (°)",
              ylabel="relative error", xticks=range(0, 181, 30))
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, columnspacing=1)


def sum_first(figure: Figure) -> None:
    """What both orders of summation store, multiply and take in one layer.

    Sizes follow from the code, times from benchmarks/results/density.json.
    """
    results = json.loads((ROOT / "benchmarks" / "results" / "density.json").read_text())
    times = results["threads"]["1"]["layer"]
    config = facet.Config(("Si",), channels=64)
    C = config.channels
    K = round(results["mean_neighbours"])
    G = facet.Density(config.degree, config.degree, config).G  # [J, m1 m2]
    M = (config.degree + 1) ** 2
    out = len(G)
    couplings = int((G != 0).sum())

    shapes, *axes = figure.subplot_mosaic([["shapes", name] for name in "abcd"],
                                          width_ratios=(1, 1.2)).values()
    tensors = (
        (0, K, out, f"edge by edge\n{K} neighbours\n× {out} (path, m)", ORANGE),
        (75, M, M, f"neighbours first\n{M} × {M} (m1, m2)", BLUE),
    )
    for x, width, height, text, colour in tensors:
        shapes.add_patch(Rectangle((x, 0), width, height, color=colour))
        shapes.text(x, -3, text, va="top", fontsize=9)
    shapes.set(xlim=(-2, 110), ylim=(-35, 50), aspect="equal",
               title="what is stored, to scale, per channel")
    shapes.set_axis_off()

    forces = times["energy+forces"]
    step = times["training step"]
    multiplications = (2 * K * couplings * C, K * M * M * C + out * M * M * C)
    panels = {
        "largest tensor, numbers per atom": (K * out * C, M * M * C),
        "multiplications per atom": multiplications,
        "ms, energy and forces": (forces["edge_wise_ms"], forces["density_ms"]),
        "ms, training step": (step["edge_wise_ms"], step["density_ms"]),
    }
    for axis, (title, values) in zip(axes, panels.items()):
        bars = axis.barh([1, 0], values, color=[ORANGE, BLUE], height=0.8)
        axis.bar_label(bars, [f" {value:,.0f}" for value in values], color=GREY)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set(yticks=[], xticks=[], xlim=(0, 1.25 * max(values)))
        axis.spines[:].set_visible(False)


def feature(figure: Figure, model: facet.Facet) -> None:
    """What the grid layer does to one channel of one atom, as functions on the sphere."""
    seen = inside(model)
    xyz = sphere()
    Y = facet.harmonics(torch.from_numpy(xyz), model.config.degree)

    def roundness(x):
        return x[0].abs() / x[1:].norm(dim=0)  # [C]

    # The channel of u, v with most to see, and the one that the layer changes most
    channel = int(sum(roundness(seen[name]) for name in ("u", "v", "product")).argmin())
    before = seen["before"]
    clear = roundness(before) < roundness(before).median()
    similar = torch.cosine_similarity(before[1:], seen["after"][1:], dim=0)
    changed = int(torch.where(clear, similar, 1.0).argmin())

    spheres = (
        ("before", changed, "before"),
        ("u", channel, "u = x W₁"),
        ("v", channel, "v = x W₂"),
        ("product", channel, "u · v, projected"),
        ("after", changed, "after: x + f W₃"),
    )
    for i, (name, c, title) in enumerate(spheres):
        axis = figure.add_subplot(1, 5, i + 1, projection="3d")
        draw_function(axis, (Y @ seen[name][:, c]).numpy(), xyz, lobes=False, zoom=1.45)
        if name in ("u", "v"):
            draw_points(axis, 3 * model.config.degree, 8)
        axis.set_title(title, fontsize=10)


def draw_errors(axis, degrees: tuple[int, ...]) -> None:
    """Errors of both grid layers under a generic rotation against points, a line for each L."""
    kinds = ((facet.SiluGrid, ORANGE, "SiLU (paper)"), (facet.ProductGrid, BLUE, "product"))
    for kind, colour, name in kinds:
        for L, line in zip(degrees, ("-", "--", ":")):
            points = []
            errors = []
            for exact_degree in (3, *range(5, 30, 2)):
                P, error = layer_error(kind, L, exact_degree, ANGLE, GENERIC)
                points.append(P)
                errors.append(error)
            label = f"{name}, L = {L}" if len(degrees) > 1 else name
            axis.loglog(points, errors, line, marker="o", color=colour, markersize=3.5, label=label)
    ticks = [6, 14, 26, 50, 86, 146, 302]
    axis.set(xlabel="grid points", xticks=ticks, xticklabels=ticks)
    axis.minorticks_off()


def errors(figure: Figure) -> None:
    """Error under rotation against grid points, for L = 1, 2, 3."""
    axis = figure.add_subplot()
    draw_errors(axis, (1, 2, 3))
    axis.set(title="error of a grid layer under a generic rotation, random weights",
             ylabel="relative error")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid()


class Turned(facet.FacetCalculator):
    """Forces turned about z by 0.57°: wrong by one percent, and not the gradient of anything."""

    def calculate(self, *arguments):
        super().calculate(*arguments)
        x, y, z = self.results["forces"].T
        self.results["forces"] = np.stack([x - 0.01 * y, y + 0.01 * x, z], 1)


def drift(figure: Figure, model: facet.Facet) -> None:
    """Total energy in molecular dynamics: forces that are a gradient, and forces that are not."""
    axis = figure.add_subplot()
    crystal = ase.build.bulk("Cu", cubic=True, a=3.65) * (2, 2, 2)
    runs = (
        (Turned, ORANGE, "forces turned by 0.6°, an error of 1 %"),
        (facet.FacetCalculator, BLUE, "forces = −gradient of the energy"),
    )
    for kind, colour, name in runs:
        # A crystal at rest turns half of its kinetic energy into potential energy: 600 K → 300 K
        run = properties.conservation(kind(model, device="cpu"), crystal, kelvin=600, steps=2000,
                                      femtoseconds=2.0)
        slope = run["drift_meV_per_atom_per_ps"]
        axis.plot(run["time_ps"], run["energy_meV_per_atom"], color=colour,
                  label=f"{name}: {slope:.1g} meV/atom/ps".replace(": -", ": −"))
    axis.set(title="32 copper atoms at about 300 K, steps of 2 fs", xlabel="time (ps)",
             ylabel="change of energy (meV/atom)")
    axis.grid()
    axis.legend()


# ─── Command line ─────────────────────────────────────────────────────────────────────────────────

PICTURES = {  # name: what draws it, its height in inches, whether it needs a trained model
    "overview": (overview, 3.0, True),
    "flow": (flow, 4.1, True),
    "splines": (splines, 4.8, True),
    "harmonics": (harmonics, 5.2, False),
    "chiral": (chiral, 1.7, False),
    "grid": (grid, 4.1, False),
    "sum_first": (sum_first, 3.2, False),
    "feature": (feature, 2.2, True),
    "errors": (errors, 3.2, False),
    "drift": (drift, 2.9, True),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "emt" / "model.pt")
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES))
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    FIGURES.mkdir(exist_ok=True)
    model = None
    for name in arguments.only:
        paint, height, needs_model = PICTURES[name]
        if needs_model and model is None:
            model = facet.load(arguments.model, dtype=torch.float64).requires_grad_(False)

        with matplotlib.rc_context(STYLE):
            figure = Figure((WIDTH, height), layout="constrained")
            if needs_model:
                paint(figure, model)
            else:
                paint(figure)
            figure.savefig(FIGURES / f"{name}.png")
        print(f"lesson/figures/{name}.png")


if __name__ == "__main__":
    main()
