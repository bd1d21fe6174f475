"""Do the tests notice mistakes? Planted bugs, and the row of the table that has to notice each.

    pytest -k planted              each bug is noticed by the row that it names
    python -m tests.test_bugs      by which rows else; counts those that are noticed

A planted bug replaces a function or a method of facet.py, in memory, by one that does something
that looks right. It takes the right function and its arguments.
"""
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from unittest import mock

import numpy as np
import pytest
import torch
from ase.data import covalent_radii

import facet
from tools.check import PARTS, PROPERTIES, Row, build, guard, guard_row, line

PLANTED = {}  # name: (function or method of facet.py, what is put in its place, row that notices)


def planted(target: str, row: str):
    def keep(wrong):
        PLANTED[wrong.__name__] = (target, wrong, row)
        return wrong
    return keep


@contextmanager
def with_bug(name: str):
    """facet.py with one bug, and no model that was built without it."""
    target, wrong, _ = PLANTED[name]
    owner = facet
    *path, attribute = target.split(".")
    for part in path:
        owner = getattr(owner, part)
    right = getattr(owner, attribute)

    def call(*arguments, **keywords):
        return wrong(right, *arguments, **keywords)
    static = isinstance(vars(owner)[attribute], staticmethod)
    with mock.patch.object(owner, attribute, staticmethod(call) if static else call):
        build.cache_clear()
        try:
            yield
        finally:
            build.cache_clear()


@planted("Facet.forward", "slope of the energy")
def src_and_dst_swapped_in_the_forces(right, self, *arguments, **keywords):
    out = right(self, *arguments, **keywords)
    return {**out, "forces": -out["forces"]}


@planted("Facet.forward", "slope of the energy")
def sign_of_the_stress(right, self, *arguments, **keywords):
    out = right(self, *arguments, **keywords)
    return {**out, "virial": -out["virial"], "stress": -out["stress"]}


@planted("find_neighbours", "another cell of the lattice")
def volume_with_a_sign(right, atoms, config):
    return right(atoms, config)._replace(volume=np.linalg.det(atoms.cell.array))


@planted("harmonics", "equals reference_numpy.py")
def lost_root_of_2l_plus_1(right, unit, L):
    return right(unit, L) / (2 * facet.degree_of_row(L) + 1).sqrt()


@planted("harmonics", "rotation")
def lost_root_of_two(right, unit, L):
    Y = right(unit, L).clone()
    for l in range(L + 1):
        Y[..., l * l + l] *= 2 ** 0.5  # m = 0, as if the others had lost it
    return Y


@planted("RadialSplines.__init__", "jump at the cutoff")
def spline_that_ends_behind_the_cutoff(right, self, count, config):
    right(self, count, config)
    self.spacing = (config.cutoff - config.first_knot) / (config.splines - 1)


@planted("RadialSplines.basis", "equals reference_numpy.py")
def wrong_piece_of_the_spline(right, self, r):
    """Four cubes make a B-spline: (2 − |t|)³ − 4 (1 − |t|)³, over 6."""
    k = torch.arange(-1, len(self.coefficients) - 1)
    t = ((r[..., None] - self.first_knot) / self.spacing - k).abs()
    return ((2 - t).clamp(min=0) ** 3 - 3 * (1 - t).clamp(min=0) ** 3) / 6


@planted("Linear.forward", "rotation")
def bias_on_every_degree(right, self, x):
    return right(self, x) + 0.1


@planted("neighbour_list", "equals reference_numpy.py")
def shift_with_the_wrong_sign(right, positions, cell, pbc, cutoff):
    dst, src, shift, vectors = right(positions, cell, pbc, cutoff)
    return dst, src, shift, vectors - 2 * shift @ np.asarray(cell)


@planted("neighbour_list", "equals reference_numpy.py")
def columns_as_lattice_vectors(right, positions, cell, pbc, cutoff):
    return right(positions, np.asarray(cell).T, pbc, cutoff)


@planted("neighbour_list", "supercell")
def own_images_dropped(right, positions, cell, pbc, cutoff):
    edges = right(positions, cell, pbc, cutoff)
    kept = edges[0] != edges[1]
    return tuple(array[kept] for array in edges)


@planted("neighbour_list", "atoms folded or not")
def too_few_images(right, positions, cell, pbc, cutoff):
    edges = right(positions, cell, pbc, cutoff)
    kept = (np.abs(edges[2]) <= 1).all(1)
    return tuple(array[kept] for array in edges)


@planted("Density.__init__", "reflection")
def odd_parity_coupling_let_in(right, self, l_in, l_out, config):
    """l = 1 × l = 1 → l = 1 is the cross product."""
    paths, gaunt = facet.paths, facet.gaunt
    cross = torch.linalg.cross(torch.eye(3)[:, None], torch.eye(3)[None], dim=-1).double()
    odd = [(1, 1, 1)] if min(l_in, l_out, config.degree) >= 1 else []
    with mock.patch.object(facet, "paths", lambda *ls: paths(*ls) + odd), mock.patch.object(
            facet, "gaunt", lambda *ls: cross if ls == (1, 1, 1) else gaunt(*ls)):
        right(self, l_in, l_out, config)


@planted("Density.forward", "jump at the cutoff")
def mean_over_the_actual_neighbours(right, self, h, index, phi, Y):
    count = phi[:, 0, :, 0].ne(0).sum(1).clamp(min=1)  # [N]
    return right(self, h, index, phi / count[:, None, None, None], Y)


@planted("Density.forward", "empty places")
def mean_over_the_padded_neighbours(right, self, h, index, phi, Y):
    return right(self, h, index, phi / phi.shape[2], Y)


@planted("make_batch", "alone or in a batch")
def padding_inside_the_cutoff(right, crystals, cutoff, dtype=torch.float32):
    return right(crystals, cutoff / 4, dtype)


@planted("make_batch", "alone or in a batch")
def neighbours_in_another_crystal(right, crystals, cutoff, dtype=torch.float32):
    batch = right(crystals, cutoff, dtype)
    first = torch.searchsorted(batch.crystal, batch.crystal)  # where the atom's crystal begins
    return batch._replace(src=batch.src - first[:, None])


@planted("Facet.forward", "alone or in a batch")
def energies_to_another_crystal(right, self, batch, *arguments, **keywords):
    return right(self, batch._replace(crystal=batch.crystal.flip(0)), *arguments, **keywords)


@planted("GridLayer.__init__", "rotation")
def grid_too_coarse(right, self, L, exact_degree):
    right(self, L, min(exact_degree, 2 * L))


@planted("ProductGrid.forward", "rotation")
def gate_from_degree_one(right, self, x):
    gate = torch.sigmoid(x[:, x.shape[1] // 3])[:, None]
    return x + (right(self, x) - x) * gate


@planted("Repulsion.forward", "equals reference_numpy.py")
def core_counted_twice(right, self, *arguments):
    return 2 * right(self, *arguments)


@planted("Repulsion.forward", "equals reference_numpy.py")
def core_of_the_wrong_neighbour(right, self, r, species, src):
    itself = torch.arange(len(src))[:, None].expand_as(src)
    return right(self, r, species, itself)


@planted("Repulsion.forward", "equals reference_numpy.py")
def core_with_a_kink(right, self, r, species, src):
    """(1 − (r/reach)⁶) instead of its cube, neighbour by neighbour."""
    energy = 0.0
    for k in range(src.shape[1]):
        reach = self.core[species] + self.core[species[src[:, k]]]
        factor = (1 - (r[:, k] / reach) ** 6).clamp(min=1e-3)
        energy = energy + right(self, r[:, k:k + 1], species, src[:, k:k + 1]) / factor ** 2
    return energy


@planted("Facet.atomic_outputs", "isolated atom")
def reference_energy_of_silicon_forgotten(right, self, batch):
    """Of one element, which the row looks at last."""
    out = right(self, batch)
    E0 = torch.where(batch.species == 0, self.config.reference_energies[0], 0.0)
    return {**out, "energies": out["energies"] - E0}


@planted("Facet.atomic_outputs", "empty places")
def last_energy_is_nan(right, self, batch):
    out = right(self, batch)
    last = torch.arange(len(batch.species)) == len(batch.species) - 1
    return {**out, "energies": out["energies"].masked_fill(last, torch.nan)}


@planted("gaunt", "equals reference_numpy.py")
def coupling_of_seven_digits(right, l1, l2, l3):
    return right(l1, l2, l3).float().double()


@planted("lebedev", "rotation")
def grid_of_seven_digits(right, exact_degree):
    points, weights = right(exact_degree)
    return points, weights.float().double()


@planted("kinship", "equals reference_numpy.py")
def elements_are_strangers(right, symbols):
    return right(symbols) * torch.eye(len(symbols), dtype=torch.float64)


@planted("Skip.forward", "equals reference_numpy.py")
def skip_connection_blind_to_species(right, self, h, species):
    return right(self, h, 0 * species)


@planted("Density.forward", "equals reference_numpy.py")
def groups_mixed_up(right, self, h, index, phi, Y):
    return right(self, h, index, phi.flip(1), Y)


@planted("NeighbourSum.backward", "gradients for weights, product")
def wrong_second_derivative(right, ctx, *gradients):
    phi, Y, h, *rest = right(ctx, *gradients)
    is_first = ctx.saved_tensors[3] is None  # there was no grad_A
    return phi, Y, h if is_first else -h, *rest


@planted("NeighbourSum.backward", "third derivatives")
def second_derivative_cut_from_the_graph(right, ctx, *gradients):
    """Training does not notice: it takes no further derivative."""
    slopes = right(ctx, *gradients)
    if ctx.saved_tensors[3] is None:  # there was no grad_A: these are first derivatives
        return slopes
    return tuple(None if slope is None else slope.detach() for slope in slopes)


@planted("Facet.forward", "gradients for weights, product")
def last_force_teaches_nothing(right, self, *arguments, **keywords):
    out = right(self, *arguments, **keywords)
    forces = out["forces"]
    return {**out, "forces": torch.cat([forces[:-1], forces[-1:].detach()])}


@planted("chunks", "supercell")
def last_atom_of_a_chunk_lost(right, *arguments):
    return [slice(atoms.start, atoms.stop - 1) for atoms in right(*arguments)]


@planted("neighbour_list", "axis that does not repeat")
def every_axis_repeats(right, positions, cell, pbc, cutoff):
    return right(positions, cell, pbc | (np.linalg.det(cell) != 0), cutoff)


@planted("neighbour_list", "axis that does not repeat")
def no_axis_repeats(right, positions, cell, pbc, cutoff):
    return right(positions, cell, np.zeros(3, bool), cutoff)


@planted("find_neighbours", "strangers 30 Å apart")
def sight_of_the_largest_atom(right, atoms, config):
    """Two radii of the largest atom that is present."""
    sight = 2 * covalent_radii[atoms.numbers].max()  # Å
    return right(atoms, replace(config, cutoff=min(sight, config.cutoff)))


VOLUMES = [1.0]


@planted("find_neighbours", "before and after another")
def volume_of_the_crystal_before(right, atoms, config):
    crystal = right(atoms, config)
    VOLUMES.append(crystal.volume)
    return crystal._replace(volume=VOLUMES[-2])


@planted("RadialSplines.basis", "float32 against float64")
def distances_of_three_digits(right, self, r):
    return right(self, r if r.dtype == torch.float64 else r.bfloat16().to(r.dtype))


def count_bugs() -> int:
    """`python -m tests.test_bugs`: how many planted bugs the table notices, and by which rows."""
    caught = 0
    for name in PLANTED:
        with with_bug(name):
            wrong = guard()
        caught += len(wrong) > 0
        print(f"{name:36} {', '.join(row.name for row in wrong) or 'NOT CAUGHT'}", flush=True)
    print(f"{caught} of {len(PLANTED)} planted bugs are caught")
    return int(caught < len(PLANTED))


@cache
def row_without_bugs(row: str, device: str = "cpu") -> Row:
    return guard_row(row, device)


@pytest.mark.parametrize("row", (*PROPERTIES, *PARTS))
def test_row_of_the_table_is_right_without_a_bug(row):
    found = row_without_bugs(row)
    assert not found.wrong, line(found)


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_caught(bug):
    """The row that the bug names is right without it, and wrong with it."""
    row = PLANTED[bug][2]
    assert not row_without_bugs(row).wrong
    with with_bug(bug):
        caught = guard_row(row)
    print(f"\n{bug}: {line(caught)}")
    assert caught.wrong, f"{row} does not notice"


if __name__ == "__main__":
    sys.exit(count_bugs())
