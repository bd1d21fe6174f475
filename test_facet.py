"""Is the potential equivariant? Properties of a potential, tested on random crystals.

    pytest test_facet.py            profile "ci": the same examples every time
    pytest -k rotation              or reflection, permutation, forces, stress, cutoff, neighbour …
    FACET_PROFILE=fast pytest       a few examples; deep: many, and new ones every time
    pytest -s -k ladder             the largest difference to reference_numpy.py, stage by stage

    python test_facet.py            the same properties of one crystal as a table; with --calculator
                                    of any ASE calculator (it calls tools/check.py)

A test draws crystals with hypothesis and checks a property, a function of tools/properties.py that
takes any calculator. A test is named after what is true. It has a control, in it or below it:
something that the check must notice, or else it proves nothing. Every tolerance stands in TOL of
tools/check.py with its reason. Models are in float64, every weight is random and none is zero.

Tests of single functions, of files and the calculator, and planted bugs are in tests/.
"""
import copy
import os
import sys
from functools import cache, partial
from itertools import product
from unittest import mock

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.neighborlist import neighbor_list
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

import facet
import reference_numpy
from tests.conftest import one_thread  # noqa: F401, a fixture that holds for every test here
from tools.check import (
    CONFIG,
    CUTOFF,
    MODELS,
    SMALL,
    TOL,
    TRICLINIC,
    build,
    differ,
    features,
    ladder,
    main,
    outputs,
    same,
)
from tools.properties import (
    ALL,
    GENERIC,
    IMPROPER,
    NotApplicable,
    conservation_error,
    cutoff_continuity,
    folding,
    force_slope,
    other_cell,
    permutation,
    reflection,
    rotated,
    rotation,
    stress_slope,
    supercell,
    translation,
    value,
    wigner,
)

common = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fast", max_examples=4, derandomize=True, **common)
settings.register_profile("ci", max_examples=20, derandomize=True, **common)
settings.register_profile("deep", max_examples=300, **common)
settings.load_profile(os.environ.get("FACET_PROFILE", "ci"))


# ─── Random crystals and rotations ──────────────────────────────────────────────────────────────
#
# What hypothesis draws, and the crystals that every test sees as well, because one of their kind
# was or could be a special case: flat, skewed, left-handed, chiral, without a cell.

def with_cell(atoms: Atoms, cell, pbc=True) -> Atoms:
    return Atoms(atoms.symbols, atoms.positions, cell=cell, pbc=pbc)


HELIX = []  # two atoms, three times around a 3₁ screw axis
for radius, angle, height in ((1.1, 0.0, 0.0), (2.0, 0.6, 0.9)):
    for n in range(3):
        turn = angle + 2 * np.pi / 3 * n
        HELIX.append((radius * np.cos(turn), radius * np.sin(turn), height + 1.6 * n))

PINNED = {
    "triclinic": TRICLINIC,
    "left-handed": with_cell(TRICLINIC, TRICLINIC.cell.array[[1, 0, 2]]),
    "slab": with_cell(TRICLINIC, TRICLINIC.cell, (True, True, False)),
    "slab without third vector": with_cell(
        TRICLINIC, TRICLINIC.cell.array * [[1], [1], [0]], (True, True, False)),
    "wire": with_cell(TRICLINIC, TRICLINIC.cell, (False, True, False)),
    "molecule": with_cell(TRICLINIC, np.zeros((3, 3)), False),
    "far outside the cell": Atoms("SiOCu", [[9.1, -7, 3], [-20, 0.3, 14], [0, 31, 2]],
                                  cell=TRICLINIC.cell, pbc=True),
    "isolated atom": Atoms("O", [[0.3, 0.2, 0.1]]),
    "dimer at the cutoff": Atoms("SiO", [[0, 0, 0], [0, 0, CUTOFF]]),
    "collinear": Atoms("SiOCu", np.outer([0, 1, 2.2], [0.6, 1.2, 1.1])),
    "planar": Atoms("SiOCuO", [[0, 0, 0], [1.6, 0.2, 0], [0.4, 1.9, 0], [2.1, 2.2, 0]]),
    "one atom and its images": Atoms("Cu", [[1, 1, 1]], pbc=True,
                                     cell=[[2.3, 0.2, 0], [0.1, 2.5, 0], [0.5, 0.4, 2.1]]),
    "skewed": Atoms("SiO", [[0, 0, 0], [1, 1.2, 1.1]], pbc=True,
                    cell=[[2.6, 0, 0], [7.3, 2.5, 0], [-5.1, 6.4, 2.4]]),
    "chiral": Atoms("Si3O3", HELIX, pbc=True,
                    cell=[[5.2, 0, 0], [-2.6, 2.6 * 3 ** 0.5, 0], [0, 0, 4.8]]),
}
FEW_VECTORS = []  # the skewed crystal without some of its cell vectors, or all, or none
for axes in product((0, 1), repeat=3):
    rows = PINNED["skewed"].cell.array * np.array(axes)[:, None]
    FEW_VECTORS.append(with_cell(PINNED["skewed"], rows, axes))


@st.composite
def crystals(draw) -> Atoms:
    """1-12 atoms, 0-3 periodic axes (some of the others without a cell vector), any handedness,
    atoms outside the cell; most cells are smaller than the cutoff.

    Atoms lie near points of a mesh whose planes are at least 1.7 Å apart, so that they and their
    images keep 1.1 Å by construction.
    """
    # What shrinks when hypothesis simplifies a crystal; all else comes from one seed
    rng = np.random.default_rng(draw(st.integers(0, 2 ** 32 - 1)))
    N = draw(st.integers(1, 12))
    pbc = np.array(draw(st.tuples(*[st.booleans()] * 3)))
    no_vector = np.array(draw(st.tuples(*[st.booleans()] * 3)))

    # A cell, turned and perhaps left-handed, large enough for the atoms
    cell = np.eye(3) + np.tril(rng.uniform(-0.5, 0.5, (3, 3)), -1)
    cell = rng.uniform(2.3, 4.5, (3, 1)) * cell @ Rotation.random(rng=rng).as_matrix()
    cell = cell[draw(st.permutations(range(3)))]  # odd permutations are left-handed
    mesh = np.zeros(3, int)
    while mesh.prod() < N:
        cell *= 1.05
        planes = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)  # Å between lattice planes
        mesh = np.maximum(1, np.floor(planes / 1.7)).astype(int)

    # Atoms near points of the mesh, some of them cells away
    sites = rng.permutation([*np.ndindex(*mesh)])[:N]  # [N, 3]
    outside = rng.integers(-1, 2, sites.shape) * (pbc | draw(st.booleans()))
    positions = (sites / mesh + outside) @ cell + rng.uniform(-0.15, 0.15, sites.shape)
    cell[~pbc & no_vector] = 0
    return Atoms(rng.choice(CONFIG.species, len(sites)), positions, cell=cell, pbc=pbc)


def rotations() -> st.SearchStrategy:
    """Rotations [3, 3] about any axis by any angle, from quaternions."""
    quaternions = st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: np.linalg.norm(q) > 0.1)
    return quaternions.map(lambda q: Rotation.from_quat(q).as_matrix())


def reflections() -> st.SearchStrategy:
    """Rotations after an inversion [3, 3]: mirrors, and mirrors that turn as well."""
    return rotations().map(lambda R: -R)


def seeds() -> st.SearchStrategy:
    return st.integers(0, 999)


def pinned(crystals=None, **arguments):
    """Run a test on these crystals, too, or on every pinned one, with these other arguments."""
    def add(test):
        for atoms in crystals or PINNED.values():
            test = example(atoms=atoms, **arguments)(test)
        return test

    return add


@cache
def tiny_calculator(**changes) -> facet.FacetCalculator:
    return facet.FacetCalculator(build(**changes), device="cpu", dtype=torch.float64)


def holds(function, atoms: Atoms, tol: str = "rounding", calculator=None, **more) -> None:
    """Fail unless the property `function` has no error, in units of the largest force.

    It is measured for energy, forces and, where there is a volume, stress.
    """
    calculator = calculator or tiny_calculator()
    size = max(1, np.abs(value(calculator, atoms, "forces")).max())
    if function not in (force_slope, stress_slope):
        more["of"] = ALL if atoms.cell.rank == 3 else ("energy", "forces")
    try:
        errors = function(calculator, atoms, **more) / size
    except NotApplicable:
        return
    same(function.__name__, errors, np.zeros_like(errors), tol)


# ─── Rotation, reflection, translation, permutation ─────────────────────────────────────────────
#
# Energy does not change, forces and stress turn along. GENERIC and IMPROPER are rotations by no
# multiple of 90°: those would prove nothing for a grid, which has the symmetry of a cube.

@given(atoms=crystals(), R=rotations())
@pinned(R=GENERIC)
def test_energy_is_invariant_and_forces_and_stress_turn_under_rotation(atoms, R):
    holds(rotation, atoms, R=R)


@given(atoms=crystals(), R=reflections())
@pinned(R=IMPROPER)
def test_energy_is_invariant_and_forces_and_stress_turn_under_reflection(atoms, R):
    holds(reflection, atoms, R=R)


@given(atoms=crystals(), shift=st.tuples(*[st.floats(-20, 20)] * 3))
@pinned(shift=(1.3, -17.1, 5.9))
def test_energy_and_forces_and_stress_are_invariant_under_translation(atoms, shift):
    holds(translation, atoms, shift=shift)


@given(atoms=crystals(), seed=seeds())
@pinned(seed=4)
def test_forces_follow_a_permutation_of_the_atoms(atoms, seed):
    holds(permutation, atoms, seed=seed)


class Crooked(facet.FacetCalculator):
    """Wrong: one of its results depends on the axes, on the place and order of the atoms and on the
    vectors of the cell, and is no slope."""

    of = "energy"

    def calculate(self, *arguments, **keywords):
        super().calculate(*arguments, **keywords)
        x = self.atoms.positions
        wrong = x * np.arange(x.size).reshape(x.shape) + self.atoms.cell.array[0]
        self.results[self.of] += {
            "energy": wrong.sum(), "forces": wrong, "stress": wrong.sum() * np.arange(6)}[self.of]


@pytest.mark.parametrize("of", ALL)
@pytest.mark.parametrize("function", (rotation, reflection, translation, permutation, other_cell,
                                      supercell, folding, force_slope, stress_slope))
def test_result_that_depends_on_axes_place_and_order_is_noticed(function, of):
    """Control of the tests of this file: each of them fails for a wrong calculator."""
    wrong = Crooked(build(), "cpu", torch.float64)
    wrong.of = of
    if (function, of) in ((force_slope, "stress"), (stress_slope, "forces")):
        holds(function, TRICLINIC, "slope", wrong)
    else:
        with pytest.raises(AssertionError, match=function.__name__):
            holds(function, TRICLINIC, "slope", wrong)


def test_rotation_permutation_and_strain_change_what_is_not_turned_along():
    """Control: what the four compare is neither zero nor the same for every crystal."""
    calculator = tiny_calculator()
    turned = rotated(TRICLINIC, GENERIC)
    for of in ("forces", "stress"):
        differ(f"{of} of a rotated crystal", value(calculator, turned, of),
               value(calculator, TRICLINIC, of))
    energies = outputs(build(), TRICLINIC)["energies"]
    differ("energies in another order", energies[::-1], energies)
    order = np.random.default_rng(4).permutation(2)
    assert order.tolist() == [1, 0], "the pinned pairs of atoms should change places"

    # Maps that stretch are no rotations
    energy = value(calculator, TRICLINIC, "energy")
    for stretch in (1.05 * np.eye(3), GENERIC + np.diag([0, 0, 0.05])):
        other = rotated(TRICLINIC, stretch)
        differ("energy of a stretched crystal", value(calculator, other, "energy"), energy)


def handedness(atoms: Atoms) -> float:
    """A number that does not depend on orientation but changes sign in a mirror.

    Triple products of sums over neighbours with three different weights.
    """
    cell = atoms.cell.array
    dst, _, _, r = facet.neighbour_list(atoms.positions, cell, atoms.pbc, CUTOFF)
    weight = CUTOFF - np.linalg.norm(r, axis=1, keepdims=True)
    sums = np.zeros((3, len(atoms), 3))
    for n in range(3):
        np.add.at(sums[n], dst, r * weight ** (n + 1))
    return np.sum(np.cross(sums[0], sums[1]) * sums[2])


class Handed(facet.FacetCalculator):
    """Wrong in a mirror only: its energy tells left from right."""

    def calculate(self, *arguments, **keywords):
        super().calculate(*arguments, **keywords)
        self.results["energy"] += handedness(self.atoms)


def test_energy_that_tells_left_from_right_is_noticed_by_reflection_alone():
    """Control: the group is O(3). Of SO(3), rotations alone, this calculator is a potential."""
    handed = Handed(build(), "cpu", torch.float64)
    for function in (rotation, translation, permutation):
        holds(function, TRICLINIC, calculator=handed)
    with pytest.raises(AssertionError, match="reflection"):
        holds(reflection, TRICLINIC, calculator=handed)


@pytest.mark.parametrize("name", ("triclinic", "chiral", "molecule"))
def test_mirror_image_of_a_chiral_crystal_has_the_same_energy(name):
    """And mirrored features; control: crystal and mirror image are not one crystal."""
    atoms = PINNED[name]
    mirror = np.diag([1, 1, -1]) @ GENERIC
    differ("handedness, zero if the crystal is not chiral", handedness(atoms), 0)
    same("handedness after a rotation", handedness(rotated(atoms, GENERIC)), handedness(atoms))
    same("handedness of the mirror image", handedness(rotated(atoms, mirror)), -handedness(atoms))
    holds(reflection, atoms, R=mirror)
    check_features(build(), atoms, mirror, wigner(mirror, 2))


def check_features(model, atoms: Atoms, R: np.ndarray, D, tol: str = "rounding") -> None:
    """Every feature of every layer of the crystal turned by R is the feature turned by D."""
    before = features(model, atoms)
    after = features(model, rotated(atoms, R))
    for (t, part), x in before.items():
        if part != "density":
            M = x.shape[1]
            turned = np.einsum("ab,nbc->nac", D.numpy()[:M, :M], x)
            same(f"features of layer {t} {part}", after[t, part], turned, tol)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "silu"])
@pytest.mark.parametrize("R", (GENERIC, IMPROPER), ids=("rotation", "reflection"))
def test_every_feature_of_every_layer_turns_under(name, R):
    """By the matrix D of Y(R u) = D Y(u); energies, forces and virial as well."""
    model = build(**MODELS[name])
    tol = "silu grid" if "silu" in name else "rounding"
    check_features(model, TRICLINIC, R, wigner(R, model.config.degree), tol)

    before = outputs(model, TRICLINIC)
    after = outputs(model, rotated(TRICLINIC, R))
    same("energies", after["energies"], before["energies"], tol)
    same("forces", after["forces"], before["forces"] @ R.T, tol)
    same("virial", after["virial"], R @ before["virial"] @ R.T, tol)


def test_features_turned_the_wrong_way_are_noticed():
    """Control: features of degrees 1 and 2 change, and D of the inverse rotation is refused."""
    before = features(build(), TRICLINIC)
    after = features(build(), rotated(TRICLINIC, GENERIC))
    for t, part in ((0, "mix"), (0, "grid"), (1, "mix"), (1, "skip"), (1, "grid")):
        for l in (1, 2):
            rows = facet.rows_of(l)
            differ(f"features of layer {t} {part}, degree {l}",
                   after[t, part][:, rows], before[t, part][:, rows])

    with pytest.raises(AssertionError, match="features of layer"):
        check_features(build(), TRICLINIC, GENERIC, wigner(GENERIC.T, 2))


@pytest.mark.parametrize("L", (1, 2, 3, 4))
def test_silu_grid_is_equivariant_up_to_the_error_of_its_grid(L):
    """A few percent, and not rounding: the control."""
    calculator = tiny_calculator(degree=L, activation="silu", channels=4, groups=2)
    size = np.abs(value(calculator, TRICLINIC, "forces")).max()
    for R in (GENERIC, IMPROPER):
        errors = rotation(calculator, TRICLINIC, R, of=ALL) / size
        same("rotation", errors, np.zeros(3), "silu")
        assert errors[1] > TOL["rounding"], "this grid should be too coarse for SiLU"


# ─── Other descriptions of the same crystal ─────────────────────────────────────────────────────

@given(atoms=crystals(), seed=seeds())
@pinned(seed=0)
def test_another_cell_of_the_lattice_changes_nothing(atoms, seed):
    holds(other_cell, atoms, seed=seed)


@given(atoms=crystals(), times=st.permutations((1, 2, 2)))
@pinned(times=(2, 2, 1))
def test_supercell_has_the_energy_of_its_copies(atoms, times):
    holds(supercell, atoms, times=times)


@pytest.mark.parametrize("activation", ("product", "silu"))
def test_supercell_of_500_atoms_has_the_energy_of_its_copies(activation):
    single = PINNED["one atom and its images"]
    calculator = tiny_calculator(activation=activation, layers=2)
    for times in ((3, 4, 5), (5, 10, 10)):
        holds(supercell, single, calculator=calculator, times=times)
    differ("stress", value(calculator, single, "stress"), np.zeros((3, 3)))


@given(atoms=crystals(), seed=seeds())
@pinned(seed=0)
def test_folding_atoms_into_the_cell_changes_nothing(atoms, seed):
    holds(folding, atoms, seed=seed)


def test_another_lattice_or_place_is_noticed():
    """Control of the four: half a lattice vector is no lattice vector."""
    calculator = tiny_calculator()
    energy = value(calculator, TRICLINIC, "energy")

    halfway = TRICLINIC.copy()
    halfway.positions[0] += TRICLINIC.cell.array[0] / 2
    other_lattice = TRICLINIC.copy()
    other_lattice.set_cell(TRICLINIC.cell.array + TRICLINIC.cell.array[[1, 2, 0]] / 2)
    molecule = with_cell(TRICLINIC, TRICLINIC.cell, False)
    for other in (halfway, other_lattice, molecule):
        differ("energy of another crystal", value(calculator, other, "energy"), energy)


@cache
def outputs_of_pinned(name: str) -> dict[str, np.ndarray]:
    return outputs(build(), PINNED[name])


@given(atoms=crystals())
@pinned()
def test_crystals_of_a_batch_do_not_see_each_other(atoms):
    """Every output, between neighbours of several sizes."""
    several = [PINNED["chiral"], atoms, PINNED["isolated atom"], TRICLINIC, atoms]
    together = outputs(build(), *several)
    this = outputs(build(), atoms)
    alone = [outputs_of_pinned("chiral"), this, outputs_of_pinned("isolated atom"),
             outputs_of_pinned("triclinic"), this]

    first = 0
    for s, crystal in enumerate(several):
        for name, found in together.items():
            rows = slice(first, first + len(crystal))
            if name in facet.PER_CRYSTAL:
                rows = slice(s, s + 1)
            if name == "stress" and crystal.cell.rank < 3:  # no volume, no stress
                assert np.isnan(found[rows]).all() and np.isnan(alone[s][name]).all()
            else:
                same(name, found[rows], alone[s][name])
        first += len(crystal)
    differ("energies of two crystals", together["energy"][0], together["energy"][2])


# ─── Forces and stress are slopes of the energy ─────────────────────────────────────────────────
#
# Central differences along a random direction of each crystal, then along all of one crystal. They
# are compared in units of the largest force, which is not zero: that is the control.

@given(atoms=crystals(), seed=seeds())
@pinned(seed=0)
def test_forces_are_minus_the_slope_of_the_energy(atoms, seed):
    holds(force_slope, atoms, "slope", seed=seed)


@given(atoms=crystals(), seed=seeds())
@pinned(seed=0)
def test_stress_is_the_slope_of_the_energy_over_the_volume(atoms, seed):
    assume(atoms.cell.rank == 3)
    holds(stress_slope, atoms, "slope", seed=seed)


EVERY_MODEL = {name: changes for name, changes in MODELS.items() if name != "silu, fine"}
for L, activation in product(range(5), ("product", "silu")):
    EVERY_MODEL[f"{activation}, L={L}"] = {"degree": L, "activation": activation, "channels": 4,
                                     "groups": 2, "first_knot": 0.6}


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_every_component_of_forces_and_stress_is_a_slope(name):
    """All 15 coordinates and 9 strains of one crystal, both ways, in one batch."""
    model = build(**EVERY_MODEL[name])
    step = 2e-5  # Å, and of the strain

    changed = []
    for n in range(3 * len(TRICLINIC)):
        for sign in (step, -step):
            moved = TRICLINIC.copy()
            moved.positions.flat[n] += sign
            changed.append(moved)
    for n in range(9):
        for sign in (step, -step):
            strain = sign * np.eye(9)[n].reshape(3, 3)
            changed.append(rotated(TRICLINIC, np.eye(3) + (strain + strain.T) / 2))

    out = outputs(model, TRICLINIC)
    energy = outputs(model, *changed)["energy"]
    slopes = (energy[::2] - energy[1::2]) / (2 * step)
    same("forces", out["forces"].ravel(), -slopes[:-9], "slope")
    same("virial", out["virial"].ravel(), slopes[-9:], "slope")
    same("stress", out["stress"], out["virial"] / TRICLINIC.get_volume(), "formula")
    differ("forces", out["forces"], 0 * out["forces"])
    differ("virial", out["virial"], 0 * out["virial"])


# ─── Cutoff, isolated atoms, dynamics ───────────────────────────────────────────────────────────

@pytest.mark.parametrize("changes", ({}, {"first_knot": 1.2}, {"activation": "silu"}), ids=str)
def test_energy_slope_and_curvature_are_continuous_at_the_cutoff(changes):
    """On a line along which an atom leaves the sight of another; distance = cutoff + s."""
    model = build(**changes)
    direction = np.array([2, -3, 6]) / 7

    def along(*s):
        clusters = [Atoms("SiOCu", [[0, 0, 0], [-1.1, 1.2, -0.9], (CUTOFF + t) * direction])
                    for t in s]
        out = outputs(model, *clusters)
        slope = -out["forces"].reshape(-1, 3, 3)[:, 2] @ direction
        return {"energy": out["energy"], "slope": slope, "curvature": np.diff(slope) / np.diff(s)}

    inside = along(-1.5e-6, -0.5e-6)
    outside = along(0.5e-6, 1.5e-6)
    beyond = along(0.5, 0.6)
    control = along(-1.5, -1.499)
    for name in control:
        same(f"{name} just inside the cutoff", inside[name], outside[name], "cutoff")
        same(f"{name} just outside", outside[name], beyond[name], "exact")
        differ(f"{name} well inside", control[name], outside[name])


@settings(max_examples=max(2, settings().max_examples // 4))
@given(atoms=crystals())
def test_energy_and_forces_do_not_jump_at_the_cutoff_of_any_crystal(atoms):
    """Where an atom is lost from sight is searched by halving."""
    assume(len(neighbor_list("i", atoms, 3.0)))
    try:
        jumps = cutoff_continuity(tiny_calculator(layers=2), atoms, of=("energy", "forces"))
    except NotApplicable:
        return  # the last atom is hidden in the core of others
    same("jumps", jumps / 10, np.zeros(2), "cutoff")


def test_isolated_atom_has_its_reference_energy_and_no_forces():
    """Alone, in a large cell, out of reach; whatever else is in the batch."""
    lonely = (
        (PINNED["isolated atom"], [2.0]),
        (PINNED["dimer at the cutoff"], [-1.0, 2.0]),
        (Atoms("Cu", cell=[9.0, 8, 7], pbc=True), [0.5]),
    )
    for changes in ({}, {"activation": "silu"}, {"degree": 0}, {"layers": 1}):
        for crystal, E0 in lonely:
            for several in ([crystal], [crystal, TRICLINIC]):
                out = outputs(build(**changes), *several)
                same("energies", out["energies"][:len(E0)], E0, "formula")
                same("forces", out["forces"][:len(E0)], np.zeros((len(E0), 3)), "exact")
                same("virial", out["virial"][0], np.zeros((3, 3)), "exact")
                stress = out["stress"][0]
                assert (stress == 0 if crystal.cell.volume else np.isnan(stress)).all()

    near = outputs(build(), Atoms("SiO", [[0, 0, 0], [0, 0, 2.0]]))
    differ("energies in reach", near["energies"], [-1.0, 2.0])
    differ("forces in reach", near["forces"], np.zeros((2, 3)))


class TooStrong(facet.FacetCalculator):
    """Forces that are ten percent too large."""

    def calculate(self, *arguments, **keywords):
        super().calculate(*arguments, **keywords)
        self.results["forces"] = 1.1 * self.results["forces"]


def test_energy_is_conserved_in_molecular_dynamics():
    """Controls: wrong forces, and steps that are eight times too long."""
    model = build(energy_scale=0.2)
    error = partial(conservation_error, atoms=TRICLINIC, kelvin=600)
    right = facet.FacetCalculator(model, "cpu", torch.float64)
    wrong = TooStrong(model, "cpu", torch.float64)
    same("spread of the energy", error(right, steps=50, femtoseconds=0.5), 0, "drift")
    assert error(wrong, steps=20, femtoseconds=0.5) > 2 * TOL["drift"]
    assert error(right, steps=50, femtoseconds=4.0) > 2 * TOL["drift"]


# ─── Neighbours ─────────────────────────────────────────────────────────────────────────────────

@given(atoms=crystals(), cutoff=st.floats(1.5, 6.0))
@pinned(cutoff=4.7)
@pinned(FEW_VECTORS, cutoff=4.7)
def test_neighbour_list_equals_that_of_ase(atoms, cutoff):
    """Pairs, shifts, vectors. A pair exactly at the cutoff adds nothing and may miss."""
    periodic = product((False, True), repeat=3) if atoms.cell.rank == 3 else [atoms.pbc]
    for pbc in periodic:
        crystal = with_cell(atoms, atoms.cell, pbc)
        ours = facet.neighbour_list(crystal.positions, crystal.cell.array, pbc, cutoff)
        those_of_ase = neighbor_list("ijSD", crystal, cutoff)
        found = []
        for i, j, S, r in (ours, those_of_ase):
            assert (np.diff(i) >= 0).all(), "not sorted by dst"
            inside = np.linalg.norm(r, axis=1) < cutoff - 1e-9
            order = np.lexsort((*S[inside].T, j[inside], i[inside]))
            found.append((np.c_[i, j, S][inside][order], r[inside][order]))
        same("dst, src, shift", found[0][0], found[1][0], "exact")
        same("vectors", found[0][1], found[1][1], "formula")


def test_neighbour_is_seen_one_way_as_the_conventions_say():
    """i receives, j is seen, r = x_j + shift·cell − x_i."""
    dst, src, shift, r = facet.neighbour_list(SMALL.positions, SMALL.cell.array, True, CUTOFF)
    assert len(dst) > 10 and shift.any()
    want = SMALL.positions[src] + shift @ SMALL.cell.array - SMALL.positions[dst]
    same("vectors", r, want, "formula")
    differ("vectors the other way", -r, want)


# ─── The ladder to the second implementation ────────────────────────────────────────────────────

@pytest.mark.parametrize("name", EVERY_MODEL)
def test_ladder_to_the_reference_holds(name):
    """Every stage of the model, in which no parameter is zero; of the smallest models forces and
    stress, too, of one of them in a left-handed cell."""
    derivatives = name in ("L=1, one layer", "L=0")
    left_handed = with_cell(SMALL, SMALL.cell.array[[1, 0, 2]])
    model = build(**EVERY_MODEL[name])
    for part, weights in model.named_parameters():
        assert weights.all(), f"{part} holds a zero: what it does is not tested"
    print(f"\n{name}: largest error against reference_numpy.py")
    steps = ladder(model, left_handed if name == "L=0" else SMALL, derivatives)
    for stage, error in steps.items():
        print(f"    {stage:16} {error:.1e}")
        same(stage, error, 0, "slope" if stage in ("forces", "stress") else "rounding")


@settings(max_examples=max(2, settings().max_examples // 4))
@given(atoms=crystals())
@pinned([PINNED["isolated atom"], PINNED["dimer at the cutoff"], *FEW_VECTORS])
def test_ladder_to_the_reference_holds_on_random_crystals(atoms):
    for stage, error in ladder(build(layers=2, channels=4, groups=2), atoms).items():
        same(stage, error, 0)


def test_ladder_breaks_where_one_number_is_another():
    """Control: the last number of any stage of the reference is off by the rounding of float32, and
    the ladder says where."""
    model = build(layers=2, channels=4, groups=2)
    with mock.patch.object(reference_numpy, "evaluate", wraps=reference_numpy.evaluate) as evaluate:
        stages = [*ladder(model, SMALL)]
        want = reference_numpy.evaluate(*evaluate.call_args.args)
    names = {"edges": "src", "density": "A", "mix": "message", "grid": "h"}

    for stage in stages:
        wrong = copy.deepcopy(want)
        for name in ("src", "energy"):
            wrong[name] = np.array(wrong[name], float)
        part = stage.split()[-1]
        numbers = wrong[names.get(part, part)]
        if stage.startswith("layer"):
            numbers = numbers[int(stage.split()[1])]
        if part == "density":
            numbers = numbers[-1]  # of the highest degree
        numbers.flat[-1] += 3e-8

        with mock.patch.object(reference_numpy, "evaluate", return_value=wrong):
            steps = ladder(model, SMALL)
        assert [name for name, error in steps.items() if error > TOL["rounding"]] == [stage]

    # Forces and stress, by differences, in their own precision
    out = outputs(model, SMALL)
    for stage in ("forces", "stress"):
        slopes = {"forces": out["forces"].copy(), "stress": out["stress"][0].copy()}
        slopes[stage].flat[-1] += 1e-4
        given = {name: mock.Mock(return_value=values) for name, values in slopes.items()}
        with mock.patch.multiple(reference_numpy, evaluate=lambda *crystal: want, **given):
            steps = ladder(model, SMALL, derivatives=True)
        assert [name for name, error in steps.items() if error > TOL["slope"]] == [stage]


if __name__ == "__main__":
    sys.exit(main("python test_facet.py"))
