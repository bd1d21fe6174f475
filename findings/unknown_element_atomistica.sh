#!/usr/bin/env bash
# atomistica 1.2.7, its Tersoff potential for silicon and carbon, with ase 3.29.0.
#
# One germanium atom in silicon, of which the potential has no parameters, is left out without a
# word: it feels no force, and the energy is that of the crystal with a vacancy in its place.
# A crystal in which no element is known raises an error.
#
# Our guess: an element without parameters raises an error.
#
# Seen:
#     Si8 -36.5998 eV, Si7Ge -27.9833 eV, Si7 -27.9833 eV, force on Ge 0.0 eV/Å
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check atomistica==1.2.7 ase==3.29.0 numpy==2.4.6 scipy

"$folder/env/bin/python" -W ignore - <<'EOF'
from ase.build import bulk
from atomistica import Tersoff

silicon = bulk("Si", cubic=True)
silicon.rattle(0.05, seed=0)
germanium = silicon.copy()
germanium.symbols[0] = "Ge"
vacancy = silicon[1:]

energies = []
for atoms in (silicon, germanium, vacancy):
    atoms.calc = Tersoff()
    energies.append(atoms.get_potential_energy())
force = abs(germanium.get_forces()[0]).max()
print("Si8 {:.4f} eV, Si7Ge {:.4f} eV, Si7 {:.4f} eV".format(*energies), end=", ")
print(f"force on Ge {force} eV/Å")
assert abs(energies[1] - energies[2]) < 1e-9 and force == 0, "it has changed"
assert energies[2] - energies[0] > 1, "nothing to see"
EOF
