"""Facet in NumPy: the equations of facet.py once more, as slow loops, by other methods. Read the two side by side.

Nothing here is fast and nothing is learned: this file exists so that facet.py can be wrong in public. Wherever a second
way to the same number exists, it is taken, so that a mistake would have to be made twice, differently, to go unnoticed:

         what                    facet.py                                  here
    §1   neighbours              KD-tree over ghost atoms                  every image, pair by pair
    §2   B-splines               four polynomial pieces, a look-up         scipy's B-splines on explicit knots
         core                    all pairs, switched off by a clamp        close pairs, one by one
    §3   spherical harmonics     Cartesian recursion, no angles            scipy's complex harmonics, with angles
    §4   coupling                Lebedev quadrature                        Gauss-Legendre in z × uniform in angle
    §5   messages                sum over neighbours, then couple          couple edge by edge, then sum
    §6   mix, linear, skip       batched matrix products                   one small product per row of a feature
    §7   grid layer, "product"   Lebedev points, all at once               other points, one at a time
         grid layer, "silu"      the same                                  one at a time, same points: they matter
    §8   forces, stress          one gradient, through the edge vectors    central differences of the energy

Sections, letters, units and conventions are those at the top of facet.py. A loop runs over the indices of its equation;
only channels c, and edges where they are all alike, stay NumPy axes. `config` is the plain dict of a facet.Config,
`state` the named tensors of a model as arrays; all is float64.
"""
from functools import lru_cache
from itertools import combinations_with_replacement, product
from math import ceil, exp, floor, pi, sqrt

import numpy as np
from ase import units
from ase.data import atomic_numbers, covalent_radii
from scipy.integrate import lebedev_rule
from scipy.interpolate import BSpline
from scipy.special import expit, sph_harm_y


# ─── §1 Crystals to neighbours ────────────────────────────────────────────────────────────────────────────────────────

def neighbours(positions, cell, pbc, cutoff):
    """All r_ij = x_j + shift·cell − x_i with |r_ij| ≤ cutoff, but for an atom and itself in its own place.

    positions [N, 3], cell [3, 3] → dst [E], src [E], shift [E, 3], vectors [E, 3], sorted by dst, then src, then shift.

    Which shifts can matter? With the periodic lattice vectors as the rows of P and P⁺ its pseudo-inverse, r = d + s P
    gives s = (r − d) P⁺: each component of s lies within |r| · |column of P⁺| of −d P⁺. That holds for any number of
    periodic axes, skewed or left-handed, and for atoms anywhere; along the other axes no cell vector is needed.
    """
    axes = np.flatnonzero(np.broadcast_to(pbc, 3))  # the periodic ones
    P = cell[axes]  # [axes, 3]
    inverse = np.linalg.pinv(P)  # [3, axes]
    reach = cutoff * np.linalg.norm(inverse, axis=0)  # [axes]
    dst, src, shift, vectors = [], [], [], []
    for i in range(len(positions)):
        for j in range(len(positions)):
            d = positions[j] - positions[i]  # [3]
            ranges = [range(floor(c - n), ceil(c + n) + 1) for c, n in zip(-d @ inverse, reach)]
            images = np.array(list(product(*ranges)), int)  # [images, axes]
            for s, r in zip(images, d + images @ P):
                itself = i == j and not s.any()
                if np.linalg.norm(r) <= cutoff and not itself:
                    dst.append(i)
                    src.append(j)
                    shift.append(np.eye(3, dtype=int)[axes].T @ s)  # zero along axes that are not periodic
                    vectors.append(r)
    return (np.array(dst, int), np.array(src, int),  # [E], [E]
            np.array(shift, int).reshape(-1, 3), np.array(vectors, float).reshape(-1, 3))  # [E, 3], [E, 3]


# ─── §2 Radial functions ──────────────────────────────────────────────────────────────────────────────────────────────

def radial_splines(r, coefficients, first_knot, cutoff):
    """φ_b(r) = Σ_k coefficients[k, b] · N_k(r): r [E], coefficients [R, count] → [E, count].

    N_k is the cubic B-spline on the five knots first_knot + (k−2, k−1, k, k+1, k+2)·h, h = (cutoff − first_knot)/R, and
    0 outside of them. k runs from −1, the first that reaches past first_knot, to R−2, the one that ends at the cutoff.
    """
    R = len(coefficients)
    h = (cutoff - first_knot) / R
    phi = np.zeros((len(r), coefficients.shape[1]))  # [E, count]
    for n, k in enumerate(range(-1, R - 1)):
        N_k = BSpline.basis_element(first_knot + h * np.arange(k - 2, k + 3), extrapolate=False)
        phi += np.nan_to_num(N_k(r))[:, None] * coefficients[n]  # scipy says nan outside of the knots
    return phi


def core(r, charge_i, charge_j, reach):
    """Half of the repulsion of two nuclei at distance r, screened by their electrons, eV; zero from `reach` on. [Z]"""
    if r >= reach:
        return 0.0
    a = 0.4685 / (charge_i ** 0.23 + charge_j ** 0.23)  # Å
    screening = (0.18175 * exp(-3.1998 * r / a) + 0.50986 * exp(-0.94229 * r / a)
                 + 0.28022 * exp(-0.4029 * r / a) + 0.02817 * exp(-0.20162 * r / a))
    unit = units._e / (4 * pi * units._eps0) * 1e10  # e²/(4πε₀), 14.4 eV Å
    return 0.5 * unit * charge_i * charge_j / r * screening * (1 - (r / reach) ** 6) ** 3


# ─── §3 Real spherical harmonics ──────────────────────────────────────────────────────────────────────────────────────

def row(l, m):
    """Row of (l, m) in a feature: degree l has rows l² … (l+1)²−1, and m = 0 is in their middle."""
    return l * l + l + m


def harmonics(vectors, L):
    """Real harmonics of the directions of vectors [E, 3], any length → [E, (L+1)²].

        Y_l0 = √4π 𝒴_l^0,     Y_l,m = √8π (−1)^m Re 𝒴_l^m,     Y_l,−m = √8π (−1)^m Im 𝒴_l^m     for m = 1 … l

    with the complex 𝒴_l^m of quantum mechanics, of unit norm: √4π makes that mean square 1, √2 pays for the half that
    Re or Im throws away, and (−1)^m takes back the Condon-Shortley sign. Polar axis z; l = 1 becomes √3 (y, z, x).
    """
    x, y, z = vectors.T  # [E]
    theta, angle = np.arctan2(np.hypot(x, y), z), np.arctan2(y, x)  # [E] from the z axis, about the z axis
    Y = np.zeros((len(vectors), (L + 1) ** 2))  # [E, M]
    for l in range(L + 1):
        Y[:, row(l, 0)] = sqrt(4 * pi) * sph_harm_y(l, 0, theta, angle).real
        for m in range(1, l + 1):
            wave = sqrt(8 * pi) * (-1) ** m * sph_harm_y(l, m, theta, angle)  # [E]
            Y[:, row(l, m)], Y[:, row(l, -m)] = wave.real, wave.imag
    return Y


# ─── §4 The grid and the coupling ─────────────────────────────────────────────────────────────────────────────────────

@lru_cache(maxsize=None)
def gauss_grid(degree, L):
    """Points on the sphere that integrate every polynomial of `degree`: weights [P] of sum 1, harmonics there [P, M].

    n Gauss-Legendre nodes integrate powers of z up to 2n−1; n equidistant angles integrate e^{imφ} for all |m| < n.
    """
    nodes, node_weights = np.polynomial.legendre.leggauss(degree // 2 + 1)
    angles = 2 * pi * np.arange(degree + 1) / (degree + 1)
    points = [(sqrt(1 - z * z) * np.cos(a), sqrt(1 - z * z) * np.sin(a), z) for z in nodes for a in angles]
    weights = np.repeat(node_weights / 2 / len(angles), len(angles))  # [P]
    return weights, harmonics(np.array(points), L)


@lru_cache(maxsize=None)
def lebedev_grid(degree, L):
    """The same with the smallest Lebedev rule of at least that degree."""
    tabulated = next(d for d in (*range(3, 32, 2), *range(35, 132, 6)) if d >= degree)
    points, weights = lebedev_rule(tabulated)  # [3, P], [P] of sum 4π
    return weights / weights.sum(), harmonics(points.T, L)


@lru_cache(maxsize=None)
def coupling(l1, l2, l3):
    """The non-zero G[m1, m2, m3], as a list of (m1, m2, m3, G).

        G[m1, m2, m3] ∝ mean over the sphere of Y_l1m1 Y_l2m2 Y_l3m3,     Σ over m1, m2 of G² = 1 for every m3

    Rotations turn every m3 into every other, so their sums are equal before scaling too and one factor does for all.
    """
    weights, Y = gauss_grid(l1 + l2 + l3, max(l1, l2, l3))  # [P], [P, M]
    G = {}
    for m1 in range(-l1, l1 + 1):
        for m2 in range(-l2, l2 + 1):
            for m3 in range(-l3, l3 + 1):
                G[m1, m2, m3] = np.sum(weights * Y[:, row(l1, m1)] * Y[:, row(l2, m2)] * Y[:, row(l3, m3)])
    scale = sqrt((2 * l3 + 1) / sum(g ** 2 for g in G.values()))
    return [(*m, scale * g) for m, g in G.items() if abs(g) > 1e-12]  # most are zero, but for rounding


def paths_to(l3, l_in, L):
    """The (l1, l2) that reach l3: triangle rule, natural parity, degree l1 ≤ l_in of the feature, l2 ≤ L of Y."""
    return [(l1, l2) for l1 in range(l_in + 1) for l2 in range(L + 1)
            if abs(l1 - l2) <= l3 <= l1 + l2 and (l1 + l2 + l3) % 2 == 0]


# ─── §5 Messages, edge by edge ────────────────────────────────────────────────────────────────────────────────────────

def messages(h, dst, src, phi, Y, l_in, l_out, mean_neighbours):
    """What each path carries to each atom, for channel c of group b:

        A[i,p,m3,bc] = Σ_j φ_b,l2(r_ij) Σ_m1,m2 G[m1,m2,m3] Y_l2m2(r̂_ij) h[j,l1m1,bc] / √mean_neighbours

    h [N, (l_in+1)², C], phi [E, B, L+1], Y [E, M] → for each l3 an array [N, 2·l3+1, Q_l3·C], paths before channels.
    facet.py swaps the sums over j and over m1, m2. Here they stand as in the formula.
    """
    (N, _, C), (_, B, degrees) = h.shape, phi.shape
    phi = np.repeat(phi, C // B, axis=1) / sqrt(mean_neighbours)  # [E, C, L+1] every channel gets its group's functions
    A = []
    for l3 in range(l_out + 1):
        paths = paths_to(l3, l_in, degrees - 1)
        A.append(np.zeros((N, 2 * l3 + 1, len(paths), C)))
        for e, (i, j) in enumerate(zip(dst, src)):
            for p, (l1, l2) in enumerate(paths):
                for m1, m2, m3, G in coupling(l1, l2, l3):
                    A[l3][i, l3 + m3, p] += phi[e, :, l2] * (G * Y[e, row(l2, m2)]) * h[j, row(l1, m1)]  # [C]
    return [a.reshape(N, 2 * l3 + 1, -1) for l3, a in enumerate(A)]


# ─── §6 Mixing and skip connection ────────────────────────────────────────────────────────────────────────────────────

def mix(A, W):
    """message[i, l3m3, c'] = Σ_pc A[i, m3, pc] W_l3[pc, c']; A as above, W for each l3 [Q_l3·C, C] → [N, M, C]."""
    message = np.zeros((len(A[0]), len(A) ** 2, W[0].shape[1]))  # [N, M, C]
    for l3, (a, W_l3) in enumerate(zip(A, W)):
        for m3 in range(-l3, l3 + 1):
            message[:, row(l3, m3)] = a[:, l3 + m3] @ W_l3  # [N, C]
    return message


def linear(x, W):
    """y[i, lm, c'] = Σ_c x[i, lm, c] W_l[c, c']; x [N, (L+1)², fan_in], W [L+1, fan_in, fan_out]."""
    y = np.zeros((*x.shape[:2], W.shape[2]))  # [N, (L+1)², fan_out]
    for l, W_l in enumerate(W):
        for m in range(-l, l + 1):
            y[:, row(l, m)] = x[:, row(l, m)] @ W_l  # [N, fan_out]
    return y


def skip(h, species, a, W, l_out):
    """An atom's own features, scaled by its species z: (h ⊙ a_z) W_l, and zeros for degrees that h does not have.

    h [N, (l_in+1)², C], species [N], a [Z, C], W [min(l_in, l_out)+1, C, C] → [N, (l_out+1)², C].
    """
    own = np.zeros((len(h), (l_out + 1) ** 2, h.shape[2]))  # [N, M, C]
    shared = len(W) ** 2  # rows that h and the result both have
    own[:, :shared] = linear(h[:, :shared] * a[species][:, None], W)  # [N, shared, C]
    return own


# ─── §7 Grid layer ────────────────────────────────────────────────────────────────────────────────────────────────────

@lru_cache(maxsize=None)
def product_spread(L):
    """[M]: standard deviation of (u ⊙ v)_lm when all rows of u and v are independent and of unit variance.

        (u ⊙ v)_m = Σ_ab ⟨Y_m Y_a Y_b⟩ u_a v_b     has variance     Σ_ab ⟨Y_m Y_a Y_b⟩²     (⟨⟩: mean over the sphere)
    """
    weights, Y = gauss_grid(3 * L, L)  # [P], [P, M]
    M = Y.shape[1]
    variance = np.zeros(M)  # [M]
    for m in range(M):
        for a in range(M):
            for b in range(M):
                variance[m] += np.sum(weights * Y[:, m] * Y[:, a] * Y[:, b]) ** 2
    return np.sqrt(variance)


def product_grid(x, W12, W3, Ws, b):
    """x + W₃ f with f = σ(s) ⊙ u(Ω) ⊙ v(Ω)/√((1 + mean v²)/2) on the sphere, s = x[00] W_s + b, and silu(s) added to the scalars.

    x [N, (L+1)², C]. Any rule of degree 3L gives the same projection, so we take another one than facet.py does. (That
    holds if config's grid_degree is 0 or at least 3L; a coarser grid makes errors, and each grid makes its own.)
    """
    N, M, C = x.shape
    L = round(sqrt(M)) - 1
    weights, Y = gauss_grid(3 * L, L)  # [P], [P, M]
    u_rows, v_rows = np.split(linear(x, W12), 2, axis=2)  # 2 × [N, M, C]
    f = np.zeros((N, M, C))  # [N, M, C]
    for i in range(N):
        s = x[i, 0] @ Ws + b  # [C]
        v_rows[i] /= sqrt((1 + (weights @ (Y @ v_rows[i]) ** 2).mean() / M) / 2)  # the mean of v² over the sphere is Σ_lm v_lm²
        for weight, Y_p in zip(weights, Y):
            u, v = Y_p @ u_rows[i], Y_p @ v_rows[i]  # [C] the functions at the point Ω_p
            f[i] += weight * np.outer(Y_p / product_spread(L), expit(s) * u * v)  # [M, C]
        f[i, 0] += s * expit(s)  # silu
    return x + linear(f, W3)


def silu_grid(x, W1, W3, b, degree):
    """x + W₃ f with f(Ω_p) = silu(g(Ω_p) W₁ + b) on the points of a Lebedev rule of that degree; x [N, (L+1)², C].

    silu is no polynomial: no rule is exact, the result depends on the points, and here they must be those of facet.py.
    """
    N, M, C = x.shape
    weights, Y = lebedev_grid(degree, round(sqrt(M)) - 1)  # [P], [P, M]
    rows = linear(x, W1)  # [N, M, C]
    f = np.zeros((N, M, C))  # [N, M, C]
    for i in range(N):
        for weight, Y_p in zip(weights, Y):
            g = Y_p @ rows[i] + b  # [C]
            f[i] += weight * np.outer(Y_p, g * expit(g))  # [M, C]
    return x + linear(f, W3)


# ─── §8 The network ───────────────────────────────────────────────────────────────────────────────────────────────────

def features(config, state, species, dst, src, phi, Y):
    """A (for each l3), message, skip, and h after the grid layer, each in a list over the layers t."""
    out = {"A": [], "message": [], "skip": [], "h": []}
    h = state["embedding"][species][:, None]  # [N, 1, C]
    degrees = [0] + [config["degree"]] * (config["layers"] - 1) + [0]  # scalars come in, scalars go out
    for t, (l_in, l_out) in enumerate(zip(degrees, degrees[1:])):
        own = {name.removeprefix(f"layers.{t}."): w for name, w in state.items() if name.startswith(f"layers.{t}.")}
        A = messages(h, dst, src, phi[:, t], Y, l_in, l_out, config["mean_neighbours"])  # l3 × [N, 2·l3+1, Q_l3 C]
        message = mix(A, [own[f"mix.W.{l3}"] for l3 in range(l_out + 1)])  # [N, M, C]
        skipped = skip(h, species, own["skip.a"], own["skip.linear.W"], l_out)  # [N, M, C]
        x = (message + skipped) / sqrt(2)  # [N, M, C]
        if config["activation"] == "product":
            h = product_grid(x, own["grid.W12.W"], own["grid.W3.W"], own["grid.Ws"], own["grid.b"])  # [N, M, C]
        else:
            degree = config["grid_degree"] or int(7.5 * l_out)
            h = silu_grid(x, own["grid.W1.W"], own["grid.W3.W"], own["grid.b"], degree)  # [N, M, C]
        for name, value in zip(("A", "message", "skip", "h"), (A, message, skipped, h)):
            out[name].append(value)
    return out


def evaluate(config, state, symbols, positions, cell, pbc):
    """Energy of a crystal and everything on the way to it, by the names that facet.py uses."""
    L, T, B = config["degree"], config["layers"], config["groups"]
    species = [config["species"].index(symbol) for symbol in symbols]  # [N]
    dst, src, shift, vectors = neighbours(np.asarray(positions, float), np.asarray(cell, float), pbc, config["cutoff"])
    r = np.linalg.norm(vectors, axis=1)  # [E]
    phi = radial_splines(r, state["splines.coefficients"], config["first_knot"], config["cutoff"])  # [E, T B (L+1)]
    phi = phi.reshape(-1, T, B, L + 1)  # [E, T, B, L+1]
    Y = harmonics(vectors, L)  # [E, M]
    out = {"dst": dst, "src": src, "shift": shift, "vectors": vectors, "r": r, "phi": phi, "Y": Y,
           **features(config, state, species, dst, src, phi, Y)}

    E0 = config["reference_energies"] or [0.0] * len(config["species"])  # [Z]
    radii = config["core"] or [0.75 * covalent_radii[atomic_numbers[symbol]] for symbol in config["species"]]  # [Z] Å
    energies = []
    for i, z in enumerate(species):
        alone = features(config, state, [z], dst[:0], src[:0], phi[:0], Y[:0])["h"][-1]  # [1, 1, C] without neighbours
        close = sum(core(r[e], atomic_numbers[symbols[i]], atomic_numbers[symbols[src[e]]], radii[z] + radii[species[src[e]]])
                    for e in np.flatnonzero(dst == i))
        energies.append(E0[z] + config["energy_scale"] * (out["h"][-1][i, 0] - alone[0, 0]) @ state["readout"] + close)
    out["energies"] = np.array(energies)  # [N]
    out["energy"] = float(out["energies"].sum())
    return out


def slope(f, step=2e-5):
    """df/dx at x = 0, from four values of f.

    For smooth f the error is of order step⁴. But the third derivative of a cubic spline jumps at its knots: where a
    distance crosses one between the four values the error is step². Hence a smaller step than such formulas ask for.
    """
    return (8 * (f(step) - f(-step)) - (f(2 * step) - f(-2 * step))) / (12 * step)


def forces(config, state, symbols, positions, cell, pbc):
    """F[i, a] = −∂E/∂x[i, a], [N, 3] eV/Å: one atom at a time is pushed along one axis."""
    positions = np.asarray(positions, float)
    F = np.zeros(positions.shape)  # [N, 3]
    for i, a in np.ndindex(F.shape):
        def energy(push):
            moved = positions.copy()
            moved[i, a] += push
            return evaluate(config, state, symbols, moved, cell, pbc)["energy"]
        F[i, a] = -slope(energy)
    return F


def stress(config, state, symbols, positions, cell, pbc):
    """σ[a, b] = (1/|det cell|) ∂E/∂ε[a, b], [3, 3] eV/Å³: cell and atoms are strained alike, x → x (1 + ε)."""
    positions, cell = np.asarray(positions, float), np.asarray(cell, float)
    sigma = np.zeros((3, 3))
    for a, b in combinations_with_replacement(range(3), 2):
        def energy(strain):
            deform = np.eye(3)
            deform[a, b] += strain / 2  # half on either side of the diagonal: symmetric, so that nothing rotates
            deform[b, a] += strain / 2
            return evaluate(config, state, symbols, positions @ deform, cell @ deform, pbc)["energy"]
        sigma[a, b] = sigma[b, a] = slope(energy)
    return sigma / (abs(np.linalg.det(cell)) or np.nan)  # no volume, no stress
