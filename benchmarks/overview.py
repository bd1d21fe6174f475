"""Draw figures/overview.png: learned splines, one feature on the sphere with its grid, equivariance error against grid points.

    python train_small.py --name emt && python benchmarks/overview.py --model runs/emt/model.pt
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

import ase.build
import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import facet  # noqa: E402


def draw_splines(axis, model: facet.Facet) -> None:
    """The radial functions that the first layer learned for l = 1, one per group."""
    config = model.config
    r = torch.linspace(config.first_knot, config.cutoff, 300, dtype=torch.float64)
    with torch.no_grad():
        phi = model.splines(r).view(len(r), config.layers, config.groups, config.degree + 1)
    axis.plot(r, phi[:, 0, :, 1], linewidth=1.4)
    axis.axhline(0, color="0.6", linewidth=0.6)
    axis.set(title="learned splines φ(r): layer 1, l = 1", xlabel="r (Å)")


def draw_sphere(axis, model: facet.Facet, crystal: ase.Atoms) -> None:
    """One channel of one atom after the first layer, as a function on the sphere, and the points of the grid."""
    kept = []
    hook = model.layers[0].register_forward_hook(lambda module, inputs, out: kept.append(out.detach()))
    model(facet.make_batch([facet.find_neighbours(crystal, model.config)], model.config.cutoff, torch.float64))
    hook.remove()
    feature = kept[0][0]  # [M, C]
    channel = feature[1:].norm(dim=0).argmax()  # the least round one
    theta, angle = np.meshgrid(np.linspace(0, np.pi, 90), np.linspace(0, 2 * np.pi, 180), indexing="ij")
    xyz = np.stack([np.sin(theta) * np.cos(angle), np.sin(theta) * np.sin(angle), np.cos(theta)], -1)
    value = (facet.harmonics(torch.from_numpy(xyz), model.config.degree) @ feature[:, channel]).numpy()
    shade = 0.5 + 0.5 * value / np.abs(value).max()
    import matplotlib
    axis.plot_surface(*np.moveaxis(xyz, -1, 0), facecolors=matplotlib.colormaps["RdBu_r"](shade), rstride=1, cstride=1, shade=False)
    points, _ = facet.lebedev(3 * model.config.degree)
    view = np.array([np.cos(np.radians(20)) * np.cos(np.radians(30)), np.cos(np.radians(20)) * np.sin(np.radians(30)), np.sin(np.radians(20))])
    front = points.numpy()[points.numpy() @ view > 0.05] * 1.02
    axis.scatter(*front.T, color="black", s=18, depthshade=False)
    axis.view_init(20, 30)
    axis.set_box_aspect((1, 1, 1), zoom=1.35)
    axis.computed_zorder = False
    axis.set_axis_off()
    axis.set_title("one atom's feature, and its 26 grid points")


def draw_errors(axis) -> None:
    """Relative error of both grid layers under a generic rotation, random weights and features, L = 2, float64."""
    R = torch.from_numpy(np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0])
    D, x = facet.rotation_of_rows(R, 2), torch.randn(200, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    config = facet.Config(("Si",), channels=16)
    for kind, colour in ((facet.SiluGrid, "tab:orange"), (facet.ProductGrid, "tab:blue")):
        points, error = [], []
        for degree in (5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                layer = kind(2, replace(config, grid_degree=degree)).double().requires_grad_(False)
            points.append(len(layer.to_grid))
            error.append(float((D @ layer(x) - layer(D @ x)).norm() / (layer(x) - x).norm()))
            print(f"{kind.__name__:12s} degree {degree:2d}, {points[-1]:3d} points: relative error {error[-1]:.1e}")
        axis.loglog(points, error, "o-", color=colour, markersize=4, label={"SiluGrid": "SiLU (paper)", "ProductGrid": "product (default)"}[kind.__name__])
    axis.legend()
    axis.set(title="error under rotation, L = 2", xlabel="grid points", xticks=[14, 26, 86, 302], xticklabels=["14", "26", "86", "302"])
    axis.minorticks_off()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ROOT / "runs" / "emt" / "model.pt")
    model = facet.load(parser.parse_args().model, dtype=torch.float64).requires_grad_(False)
    crystal = ase.build.bulk(model.config.species[0], "fcc", a=3.9, cubic=True)
    crystal.symbols = [model.config.species[i % len(model.config.species)] for i in range(4)]
    crystal.rattle(0.25, seed=1)
    figure = Figure((13, 4), layout="constrained")
    draw_splines(figure.add_subplot(131), model)
    draw_sphere(figure.add_subplot(132, projection="3d"), model, crystal)
    draw_errors(figure.add_subplot(133))
    figure.savefig(ROOT / "figures" / "overview.png", dpi=120)


if __name__ == "__main__":
    main()
