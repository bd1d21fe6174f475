#!/usr/bin/env bash
# dftd3 1.7.0 and dftd4 4.3.1, their ASE calculators, with ase 3.29.0.
#
# For atoms that repeat along two axes, pbc=(True, True, False), the dispersion energy depends on the
# length of the cell vector along the third. With dftd4 a slab whose cell is just as high as the slab
# itself has the energy of the bulk crystal; with dftd3 it has neither that nor the one of a slab.
#
# Our guess: along an axis that does not repeat there are no images, so the vector does not matter.
# (Or there is an error, if a method only knows three periodic axes.)
#
# Seen, eV per atom:
#     D3: bulk -0.3144, slab in a cell of 5.43 Å -0.2382, of 40 Å -0.1977
#     D4: bulk -0.3321, slab in a cell of 5.43 Å -0.3321, of 40 Å -0.2488
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check dftd3==1.7.0 dftd4==4.3.1 ase==3.29.0 numpy==2.4.6

"$folder/env/bin/python" -W ignore - <<'END'
from ase.build import bulk
from dftd3.ase import DFTD3
from dftd4.ase import DFTD4

seen = {"D3": (-0.3144, -0.2382, -0.1977), "D4": (-0.3321, -0.3321, -0.2488)}
for name, make in (("D3", lambda: DFTD3(method="PBE", damping="d3bj")),
                   ("D4", lambda: DFTD4(method="PBE"))):
    crystal = bulk("Si", cubic=True)
    crystal.rattle(0.05, seed=0)
    slab = crystal.copy()
    slab.pbc = (True, True, False)
    high = slab.copy()
    high.cell[2] = (0, 0, 40)

    energies = []
    for atoms in (crystal, slab, high):
        atoms.calc = make()
        energies.append(atoms.get_potential_energy() / len(atoms))
    print("{}: bulk {:.4f}, slab in a cell of 5.43 Å {:.4f}, of 40 Å {:.4f}".format(
        name, *energies))
    for energy, before in zip(energies, seen[name]):
        assert abs(energy - before) < 1e-3, "it has changed"
END
