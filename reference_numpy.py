"""Facet in NumPy: the equations of facet.py once more, as slow loops, by other methods.

Read the two side by side. Nothing here is fast and nothing is learned: this file exists so that
facet.py can be wrong in public. Wherever a second way to the same number exists, it is taken, so
that a mistake would have to be made twice, differently, to go unnoticed:

         what                   facet.py                          here
    §1   neighbours             KD-tree over ghost atoms          every image, pair by pair
    §2   B-splines              four cubic pieces, a look-up      scipy's, on explicit knots
         repulsion              all pairs, ended by a clamp       close pairs, one by one
    §3   spherical harmonics    Cartesian recursion, no angles    scipy's complex ones, by angles
    §4   coupling               Lebedev quadrature                Gauss-Legendre × equal angles
    §5   messages               sum over neighbours, then couple  couple edge by edge, then sum
    §6   mix, linear, skip      batched matrix products           one small product per row
         kinship of elements    from noble gases, by arithmetic   a periodic table, as printed
    §7   grid layer, "product"  Lebedev points, all at once       other points, one at a time
         grid layer, "silu"     the same points, all at once      those points, one at a time
    §8   forces, stress         one gradient, through the edges   central differences of the energy

Papers, sections, letters, units and conventions are those at the top of facet.py. A loop runs over
the indices of its equation; only channels, and edges where they are all alike, stay NumPy axes.
`config` is the plain dict of a facet.Config, `state` the named tensors of a model as arrays; all is
float64.
"""
from functools import lru_cache, partial
from itertools import product
from math import ceil, exp, floor, pi, sqrt

import numpy as np
from ase import units
from ase.data import atomic_numbers, covalent_radii
from scipy.integrate import lebedev_rule
from scipy.interpolate import BSpline
from scipy.linalg import sqrtm
from scipy.special import expit, sph_harm_y

# ─── §1 Crystals to neighbours ───


def neighbours(positions, cell, pbc, cutoff):
    """All r_ij = x_j + shift·cell − x_i no longer than the cutoff.

    An atom does not see itself, but it sees its images.

    positions [N, 3] Å, cell [3, 3] Å (rows), pbc: three booleans, cutoff Å.
    Returns dst [E], src [E], shift [E, 3] (integers), vectors [E, 3] Å, sorted by dst, then src,
    then shift.

    Which shifts can matter? Let the rows of P be the periodic lattice vectors and P⁺ its
    pseudo-inverse. With d = x_j − x_i, r = d + shift P gives shift = (r − d) P⁺: each component of
    the shift lies within |r| · |column of P⁺| of that of −d P⁺. That holds for any number of
    periodic axes, skewed or left-handed, and for atoms anywhere; along the other axes no cell
    vector is needed.
    """
    axes = np.flatnonzero(np.broadcast_to(pbc, 3))  # [axes] the periodic ones
    lattice = cell[axes]  # [axes, 3] P
    inverse = np.linalg.pinv(lattice)  # [3, axes] P⁺
    reach = cutoff * np.linalg.norm(inverse, axis=0)  # [axes]

    dst = []
    src = []
    shift = []
    vectors = []
    for i in range(len(positions)):
        for j in range(len(positions)):

            # Images of atom j that can be near atom i
            d = positions[j] - positions[i]  # [3]
            middle = -d @ inverse  # [axes]
            ranges = []
            for axis in range(len(axes)):
                lowest = floor(middle[axis] - reach[axis])
                highest = ceil(middle[axis] + reach[axis])
                ranges.append(range(lowest, highest + 1))
            images = np.array(list(product(*ranges)), int)  # [images, axes]
            candidates = d + images @ lattice  # [images, 3]

            # Those that are
            for image, vector in zip(images, candidates):
                itself = i == j and not image.any()
                if np.linalg.norm(vector) <= cutoff and not itself:
                    shift_ij = np.zeros(3, int)  # [3] zero along axes that are not periodic
                    shift_ij[axes] = image
                    dst.append(i)
                    src.append(j)
                    shift.append(shift_ij)
                    vectors.append(vector)

    return (
        np.array(dst, int),  # [E]
        np.array(src, int),  # [E]
        np.array(shift, int).reshape(-1, 3),  # [E, 3]
        np.array(vectors, float).reshape(-1, 3),  # [E, 3]
    )


# ─── §2 Radial functions ───


def radial_splines(r, coefficients, first_knot, cutoff):
    """φ_b(r) = Σ_k coefficients[k, b] · bump(t − k),  t = (r − first_knot)/spacing.

    [F §3.1], [deBoor]. r [E] Å, coefficients [R, count], first_knot Å, cutoff Å → [E, count].

    bump(t − k) is the cubic B-spline on the five knots t = k−2, k−1, k, k+1, k+2, and 0 outside of
    them. k runs from −1, the first that reaches past first_knot, to R−2, the one that ends at the
    cutoff.
    """
    R, count = coefficients.shape
    spacing = (cutoff - first_knot) / R  # Å
    phi = np.zeros((len(r), count))  # [E, count]

    for k in range(-1, R - 1):
        knots = first_knot + spacing * np.arange(k - 2, k + 3)  # [5] Å
        bump = BSpline.basis_element(knots, extrapolate=False)
        bump_r = np.nan_to_num(bump(r))  # [E] scipy says nan outside of the knots
        phi += bump_r[:, None] * coefficients[k + 1]  # [E, count]
    return phi


def repulsion(r, charge_i, charge_j, end):
    """Half of the repulsion of two nuclei at distance r, screened by their electrons, eV. [ZBL]

        V(r) = k q_i q_j / r · ξ(r/a) · (1 − (r/ρ)⁶)³    for r < ρ, else 0

    r Å, charges in units of e, end Å: ρ, the sum of the two cores.
    """
    if r >= end:
        return 0.0

    # Two bare nuclei
    coulomb_constant = units._e / (4 * pi * units._eps0) * 1e10  # eV Å, k = e²/(4πε₀) = 14.4
    coulomb = 0.5 * coulomb_constant * charge_i * charge_j / r  # eV

    # Their electrons
    a = 0.4685 / (charge_i ** 0.23 + charge_j ** 0.23)  # Å
    xi = (0.18175 * exp(-3.1998 * r / a) + 0.50986 * exp(-0.94229 * r / a)
          + 0.28022 * exp(-0.4029 * r / a) + 0.02817 * exp(-0.20162 * r / a))

    # The end, with two derivatives
    switch = (1 - (r / end) ** 6) ** 3
    return coulomb * xi * switch


# ─── §3 Real spherical harmonics ───


def row(l, m):
    """Row of (l, m) in a feature: degree l has rows l² … (l+1)²−1, and m = 0 is in their middle."""
    return l * l + l + m


def harmonics(vectors, L):
    """Real harmonics of the directions of vectors [E, 3], any length → [E, (L+1)²].

        Y_l0   = √4π 𝒴_l^0
        Y_l,m  = √8π (−1)^m Re 𝒴_l^m,    Y_l,−m = √8π (−1)^m Im 𝒴_l^m,    m = 1 … l

    with the complex 𝒴_l^m of quantum mechanics, of unit norm: √4π makes that mean square 1, √2 pays
    for the half that Re or Im throws away, and (−1)^m takes back the Condon-Shortley sign. Polar
    axis z; l = 1 becomes √3 (y, z, x).
    """
    # Spherical angles: theta from the z axis, angle about it
    x, y, z = vectors.T  # [E], [E], [E]
    theta = np.arctan2(np.hypot(x, y), z)  # [E]
    angle = np.arctan2(y, x)  # [E]

    Y = np.zeros((len(vectors), (L + 1) ** 2))  # [E, M]
    for l in range(L + 1):
        Y[:, row(l, 0)] = sqrt(4 * pi) * sph_harm_y(l, 0, theta, angle).real  # [E]
        for m in range(1, l + 1):
            wave = sqrt(8 * pi) * (-1) ** m * sph_harm_y(l, m, theta, angle)  # [E]
            Y[:, row(l, m)] = wave.real
            Y[:, row(l, -m)] = wave.imag
    return Y


# ─── §4 The grid and the coupling ───


@lru_cache(maxsize=None)
def gauss_grid(exact_degree, L):
    """Points on the sphere that integrate every polynomial of exact_degree.

    Returns weights [P] of sum 1 and the harmonics at the points [P, (L+1)²].

    n Gauss-Legendre nodes integrate powers of z up to 2n−1; n equidistant angles integrate e^{imφ}
    for all |m| < n.
    """
    nodes, node_weights = np.polynomial.legendre.leggauss(exact_degree // 2 + 1)  # [nodes], [nodes]
    angles = 2 * pi * np.arange(exact_degree + 1) / (exact_degree + 1)  # [angles]

    points = []
    for z in nodes:
        for angle in angles:
            x = sqrt(1 - z * z) * np.cos(angle)
            y = sqrt(1 - z * z) * np.sin(angle)
            points.append((x, y, z))

    weights = np.repeat(node_weights / 2 / len(angles), len(angles))  # [P]
    return weights, harmonics(np.array(points), L)  # [P], [P, M]


@lru_cache(maxsize=None)
def lebedev_grid(exact_degree, L):
    """The same with the smallest Lebedev rule of at least exact_degree. [Lebedev]

    Raises ValueError beyond degree 131, the largest rule there is.
    """
    for tabulated in (*range(3, 32, 2), *range(35, 132, 6)):
        if tabulated >= exact_degree:
            points, weights = lebedev_rule(tabulated)  # [3, P], [P]
            return weights / weights.sum(), harmonics(points.T, L)  # [P], [P, M]
    raise ValueError(f"no Lebedev rule has degree {exact_degree}; the largest is 131")


@lru_cache(maxsize=None)
def coupling(l1, l2, l3):
    """The coupling coefficients that are not zero, as a list of (m1, m2, m3, G). [F §3.3]

        G[m1, m2, m3] ∝ mean over the sphere of Y_l1m1 Y_l2m2 Y_l3m3,   Σ_m1,m2 G² = 1 for every m3

    Rotations turn every m3 into every other, so their sums are equal before scaling, too, and one
    factor does for all.
    """
    weights, Y = gauss_grid(l1 + l2 + l3, max(l1, l2, l3))  # [P], [P, M]

    # The means; most are zero, but for rounding
    means = []
    sum_of_squares = 0.0
    for m1 in range(-l1, l1 + 1):
        for m2 in range(-l2, l2 + 1):
            for m3 in range(-l3, l3 + 1):
                Y1 = Y[:, row(l1, m1)]  # [P]
                Y2 = Y[:, row(l2, m2)]  # [P]
                Y3 = Y[:, row(l3, m3)]  # [P]
                mean = np.sum(weights * Y1 * Y2 * Y3)
                sum_of_squares += mean ** 2
                if abs(mean) > 1e-12:
                    means.append((m1, m2, m3, mean))

    # The scale: a sum of 1 for each of the 2·l3+1 values of m3
    scale = sqrt((2 * l3 + 1) / sum_of_squares)
    return [(m1, m2, m3, scale * mean) for m1, m2, m3, mean in means]


def paths_to(l3, l_in, L):
    """The (l1, l2) that reach l3: feature l1 ≤ l_in times harmonic l2 ≤ L.

    Only those of natural parity that satisfy the triangle rule |l1 − l2| ≤ l3 ≤ l1 + l2.
    """
    found = []
    for l1 in range(l_in + 1):
        for l2 in range(L + 1):
            triangle = abs(l1 - l2) <= l3 <= l1 + l2
            if triangle and (l1 + l2 + l3) % 2 == 0:
                found.append((l1, l2))
    return found


# ─── §5 Density: edge by edge ───


def messages(h, dst, src, phi, Y, l_in, l_out, mean_neighbours):
    """What each path carries to each atom, for channel c of group b. [F §3.2]

        A[i,p,m3,bc] = Σ_j φ_b,l2(r_ij) Σ_m1,m2 G[m1,m2,m3] Y_l2m2(r̂_ij) h[j,l1m1,bc]
                       / √mean_neighbours

    h [N, (l_in+1)², C] features, dst [E], src [E], phi [E, B, L+1] radial functions, Y [E, M]
    harmonics → for each l3 an array [N, 2·l3+1, Q_l3·C], paths before channels.
    facet.py swaps the sums over j and over m1, m2. Here they stand as in the formula.
    """
    N, _, C = h.shape
    B = phi.shape[1]
    L = phi.shape[2] - 1

    # Every channel gets the functions of its group
    phi = np.repeat(phi, C // B, axis=1) / sqrt(mean_neighbours)  # [E, C, L+1]

    A = []
    for l3 in range(l_out + 1):
        paths = paths_to(l3, l_in, L)
        A_l3 = np.zeros((N, 2 * l3 + 1, len(paths), C))  # [N, 2·l3+1, Q_l3, C]

        # Edge by edge, path by path, all (m1, m2, m3)
        for e in range(len(dst)):
            i = dst[e]
            j = src[e]
            for p, (l1, l2) in enumerate(paths):
                for m1, m2, m3, G in coupling(l1, l2, l3):
                    Y_m2 = Y[e, row(l2, m2)]
                    h_m1 = h[j, row(l1, m1)]  # [C]
                    A_l3[i, l3 + m3, p] += phi[e, :, l2] * (G * Y_m2) * h_m1  # [C]

        A.append(A_l3.reshape(N, 2 * l3 + 1, -1))  # [N, 2·l3+1, Q_l3·C]
    return A


# ─── §6 Mixing, species and skip connection ───


def mix(A, W):
    """message[i, l3 m3, c'] = Σ_pc A[i, m3, pc] W_l3[pc, c'].

    A as `messages` returns it, W: for each l3 [Q_l3·C, C] → [N, (l_out+1)², C].
    """
    N = len(A[0])
    C = W[0].shape[1]
    l_out = len(A) - 1
    message = np.zeros((N, (l_out + 1) ** 2, C))  # [N, M, C]

    for l3 in range(l_out + 1):
        for m3 in range(-l3, l3 + 1):
            message[:, row(l3, m3)] = A[l3][:, l3 + m3] @ W[l3]  # [N, C]
    return message


def linear(x, W):
    """y[i, lm, c'] = Σ_c x[i, lm, c] W_l[c, c'].

    x [N, (L+1)², fan_in], W [L+1, fan_in, fan_out] → [N, (L+1)², fan_out].
    """
    N, M, _ = x.shape
    fan_out = W.shape[2]
    y = np.zeros((N, M, fan_out))  # [N, M, fan_out]

    for l in range(len(W)):
        for m in range(-l, l + 1):
            y[:, row(l, m)] = x[:, row(l, m)] @ W[l]  # [N, fan_out]
    return y


PERIODIC_TABLE = """
H  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  He
Li Be .  .  .  .  .  .  .  .  .  .  B  C  N  O  F  Ne
Na Mg .  .  .  .  .  .  .  .  .  .  Al Si P  S  Cl Ar
K  Ca Sc Ti V  Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr
Rb Sr Y  Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I  Xe
Cs Ba La Hf Ta W  Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn
Fr Ra Ac Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og
"""
F_BLOCK = {6: "Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu",
           7: "Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr"}


def period_and_group(symbol):
    """Row and column of an element, from 1; the f-block stands in column 3."""
    for period, line in enumerate(PERIODIC_TABLE.split("\n")[1:-1], start=1):
        if symbol in line.split():
            return period, line.split().index(symbol) + 1
        if symbol in F_BLOCK.get(period, "").split():
            return period, 3


def species_table(symbols, W):
    """√K W, a row of features for each species: [Z, C]; W [Z, C]. Elements alike have rows alike.

        K[z, z'] = 0.9 exp(−(Δgroup² + (Δperiod/4)² + (Δradius/0.3 Å)²)/2) + 0.1 [z = z']
    """
    Z = len(symbols)
    K = np.zeros((Z, Z))  # [Z, Z]
    for a, one in enumerate(symbols):
        for b, other in enumerate(symbols):
            period_a, group_a = period_and_group(one)
            period_b, group_b = period_and_group(other)
            radius_a = covalent_radii[atomic_numbers[one]]  # Å
            radius_b = covalent_radii[atomic_numbers[other]]  # Å

            apart = (group_a - group_b) ** 2
            apart += ((period_a - period_b) / 4) ** 2
            apart += ((radius_a - radius_b) / 0.3) ** 2
            K[a, b] = 0.9 * exp(-apart / 2) + 0.1 * (a == b)
    return np.real(sqrtm(K)) @ W  # [Z, C]


def skip(h, species, a, W, l_out):
    """An atom's own features, scaled by its species z: (h ⊙ a_z) W_l.

    Degrees that h does not have get zeros.
    h [N, (l_in+1)², C], species [N], a [Z, C], W [min(l_in, l_out)+1, C, C] → [N, (l_out+1)², C].
    """
    N, _, C = h.shape
    shared = len(W) ** 2  # rows that h and the result both have
    own = h[:, :shared] * a[species][:, None]  # [N, shared, C]
    carried = np.zeros((N, (l_out + 1) ** 2, C))  # [N, (l_out+1)², C]
    carried[:, :shared] = linear(own, W)  # [N, shared, C]
    return carried


# ─── §7 Grid layer ───


@lru_cache(maxsize=None)
def product_spread(L):
    """[M]: standard deviation of (u ⊙ v)_m, where all rows of u and v have unit variance.

        (u ⊙ v)_m = Σ_ab ⟨Y_m Y_a Y_b⟩ u_a v_b          (⟨⟩: mean over the sphere)
        variance  = Σ_ab ⟨Y_m Y_a Y_b⟩²                 if all of them are independent
    """
    weights, Y = gauss_grid(3 * L, L)  # [P], [P, M]
    M = (L + 1) ** 2
    variance = np.zeros(M)  # [M]

    for m in range(M):
        for a in range(M):
            for b in range(M):
                mean = np.sum(weights * Y[:, m] * Y[:, a] * Y[:, b])
                variance[m] += mean ** 2
    return np.sqrt(variance)  # [M]


def product_grid(x, W12, W3, Ws, b):
    """x + W₃ f with a product of two functions on the sphere, x(Ω) = Σ_lm Y_lm(Ω) x[lm]. [F §3.3]

        f[lm] = Σ_p weight_p Y_lm(Ω_p) / spread_l σ(s) ⊙ u(Ω_p) ⊙ v(Ω_p)  +  [l = 0] silu(s)
        u = x W₁,    v = x W₂ / √((1 + mean (x W₂)²)/2),    s = x[00] W_s + b

    x [N, (L+1)², C], W12 [L+1, C, 2·C], W3 [L+1, C, C], Ws [C, C], b [C] → [N, (L+1)², C].

    Any rule of degree 3L gives the same projection, so we take another one than facet.py does.
    (That holds if config's grid_degree is 0 or at least 3L; a coarser grid makes errors, and each
    grid makes its own.)
    """
    N, M, C = x.shape
    L = round(sqrt(M)) - 1
    weights, Y = gauss_grid(3 * L, L)  # [P], [P, M]
    spread = product_spread(L)  # [M]
    u_rows, v_rows = np.split(linear(x, W12), 2, axis=2)  # 2 × [N, M, C]
    f = np.zeros((N, M, C))  # [N, M, C]

    for i in range(N):
        # The length of v: the mean of v² over the sphere is Σ_lm v_lm², a sum of M rows
        v_grid = Y @ v_rows[i]  # [P, C]
        mean_square = (weights @ v_grid ** 2).mean() / M
        v_rows[i] /= sqrt((1 + mean_square) / 2)

        # The scalars decide how much of it passes
        s = x[i, 0] @ Ws + b  # [C]
        gate = expit(s)  # [C]

        # The product, point by point, back to the rows
        for weight, Y_p in zip(weights, Y):
            u = Y_p @ u_rows[i]  # [C]
            v = Y_p @ v_rows[i]  # [C]
            f[i] += weight * np.outer(Y_p / spread, gate * u * v)  # [M, C]

        # The scalars go on by themselves
        f[i, 0] += s * gate  # [C] silu(s)
    return x + linear(f, W3)  # [N, M, C]


def silu_grid(x, W1, W3, b, exact_degree):
    """x + W₃ f with f[lm] = Σ_p weight_p Y_lm(Ω_p) silu(x(Ω_p) W₁ + b), as in the paper. [F §3.3]

    x [N, (L+1)², C], W1 [L+1, C, C], W3 [L+1, C, C], b [C] → [N, (L+1)², C].

    The points are those of a Lebedev rule of exact_degree. silu is no polynomial: no rule is exact,
    the result depends on the points, and here they must be those of facet.py.
    """
    N, M, C = x.shape
    L = round(sqrt(M)) - 1
    weights, Y = lebedev_grid(exact_degree, L)  # [P], [P, M]
    rows = linear(x, W1)  # [N, M, C]
    f = np.zeros((N, M, C))  # [N, M, C]

    # Point by point: to the grid, silu, back to the rows
    for i in range(N):
        for weight, Y_p in zip(weights, Y):
            value = Y_p @ rows[i] + b  # [C]
            f[i] += weight * np.outer(Y_p, value * expit(value))  # [M, C]
    return x + linear(f, W3)  # [N, M, C]


# ─── §8 The network ───


def features(config, state, species, dst, src, phi, Y):
    """A (for each l3), message, skip, and h after the grid layer, each in a list over the layers t.

    species [N], dst [E], src [E], phi [E, T, B, L+1], Y [E, M].
    """
    T = config["layers"]
    L = config["degree"]
    out = {"A": [], "message": [], "skip": [], "h": []}

    symbols = config["species"]
    h = species_table(symbols, state["embedding.W"])[species][:, None]  # [N, 1, C]
    for t in range(T):
        # Scalars come in, scalars go out
        l_in = 0 if t == 0 else L
        l_out = 0 if t == T - 1 else L

        # What the neighbours send, path by path, then mixed
        A = messages(h, dst, src, phi[:, t], Y, l_in, l_out, config["mean_neighbours"])
        W = [state[f"layers.{t}.mix.W.{l3}"] for l3 in range(l_out + 1)]  # l3 × [Q_l3·C, C]
        message = mix(A, W)  # [N, (l_out+1)², C]

        # What the atom has itself
        a = species_table(symbols, state[f"layers.{t}.skip.a.W"])  # [Z, C]
        carried = skip(h, species, a, state[f"layers.{t}.skip.linear.W"], l_out)
        x = (message + carried) / sqrt(2)  # [N, (l_out+1)², C]

        # The grid layer
        W3 = state[f"layers.{t}.grid.W3.W"]  # [l_out+1, C, C]
        b = state[f"layers.{t}.grid.b"]  # [C]
        if config["activation"] == "product":
            W12 = state[f"layers.{t}.grid.W12.W"]  # [l_out+1, C, 2·C]
            Ws = state[f"layers.{t}.grid.Ws"]  # [C, C]
            h = product_grid(x, W12, W3, Ws, b)  # [N, (l_out+1)², C]
        else:
            W1 = state[f"layers.{t}.grid.W1.W"]  # [l_out+1, C, C]
            exact_degree = config["grid_degree"] or int(7.5 * l_out)
            h = silu_grid(x, W1, W3, b, exact_degree)  # [N, (l_out+1)², C]

        out["A"].append(A)
        out["message"].append(message)
        out["skip"].append(carried)
        out["h"].append(h)
    return out


def evaluate(config, state, symbols, positions, cell, pbc):
    """Energy of a crystal and everything on the way to it, by the names that facet.py uses.

        energy = Σ_i E0[z_i] + energy_scale · (h_i − h_alone[z_i]) · readout + repulsion_i

    symbols: N chemical symbols, positions [N, 3] Å, cell [3, 3] Å (rows), pbc: three booleans.
    """
    L = config["degree"]
    T = config["layers"]
    B = config["groups"]
    cutoff = config["cutoff"]
    known = config["species"]
    N = len(symbols)
    species = [known.index(symbol) for symbol in symbols]  # [N]

    # Edges, and what belongs to each
    positions = np.asarray(positions, float)
    cell = np.asarray(cell, float)
    dst, src, shift, vectors = neighbours(positions, cell, pbc, cutoff)  # [E], [E], [E, 3], [E, 3]
    r = np.linalg.norm(vectors, axis=1)  # [E]
    phi = radial_splines(r, state["splines.coefficients"], config["first_knot"], cutoff)
    phi = phi.reshape(-1, T, B, L + 1)  # [E, T, B, L+1]
    Y = harmonics(vectors, L)  # [E, M]

    # The layers
    out = {"dst": dst, "src": src, "shift": shift, "vectors": vectors, "r": r, "phi": phi, "Y": Y}
    out.update(features(config, state, species, dst, src, phi, Y))
    h = out["h"][-1]  # [N, 1, C]

    # Constants of each species: reference energy, nuclear charge, core
    E0 = config["reference_energies"] or [0.0] * len(known)  # [Z] eV
    charge = [atomic_numbers[symbol] for symbol in known]  # [Z]
    usual = [min(0.75 * covalent_radii[q], config["cutoff"] / 2) for q in charge]  # [Z] Å
    core = config["core"] or usual  # [Z] Å

    energies = np.zeros(N)  # [N] eV
    for i in range(N):
        z = species[i]

        # What the network makes of an atom without neighbours is no energy of an atom
        lone = features(config, state, [z], dst[:0], src[:0], phi[:0], Y[:0])
        alone = lone["h"][-1][0, 0]  # [C]
        learned = config["energy_scale"] * (h[i, 0] - alone) @ state["readout"]

        # Atoms that are too close
        repelled = 0.0
        for e in range(len(dst)):
            if dst[e] == i:
                other = species[src[e]]
                repelled += repulsion(r[e], charge[z], charge[other], core[z] + core[other])

        energies[i] = E0[z] + learned + repelled

    out["energies"] = energies
    out["energy"] = float(energies.sum())
    return out


def slope(f, step=2e-5):
    """df/dx at x = 0, from four values of f.

    For smooth f the error is of order step⁴. But the third derivative of a cubic spline jumps at
    its knots: where a distance crosses one between the four values the error is step². Hence a
    smaller step than such formulas ask for.
    """
    near = f(step) - f(-step)
    far = f(2 * step) - f(-2 * step)
    return (8 * near - far) / (12 * step)


def forces(config, state, symbols, positions, cell, pbc):
    """F[i, axis] = −∂energy/∂x[i, axis], [N, 3] eV/Å: one atom at a time is pushed along one axis.

    The arguments are those of `evaluate`.
    """
    positions = np.asarray(positions, float)

    def energy(i, axis, push):
        """eV, with atom i pushed by so many Å."""
        moved = positions.copy()
        moved[i, axis] += push
        return evaluate(config, state, symbols, moved, cell, pbc)["energy"]

    F = np.zeros(positions.shape)  # [N, 3]
    for i in range(len(positions)):
        for axis in range(3):
            F[i, axis] = -slope(partial(energy, i, axis))
    return F


def stress(config, state, symbols, positions, cell, pbc):
    """σ[axis, other] = (1/volume) ∂energy/∂strain[axis, other], [3, 3] eV/Å³.

    Cell and atoms are strained alike, x → x (1 + strain); nan where the cell has no volume. The
    arguments are those of `evaluate`.
    """
    positions = np.asarray(positions, float)
    cell = np.asarray(cell, float)

    def energy(axis, other, strain):
        """eV; half of the strain on either side of the diagonal, so that nothing rotates."""
        deform = np.eye(3)
        deform[axis, other] += strain / 2
        deform[other, axis] += strain / 2
        strained = positions @ deform  # [N, 3]
        return evaluate(config, state, symbols, strained, cell @ deform, pbc)["energy"]

    sigma = np.zeros((3, 3))
    for axis in range(3):
        for other in range(axis, 3):
            sigma[axis, other] = slope(partial(energy, axis, other))
            sigma[other, axis] = sigma[axis, other]

    volume = abs(np.linalg.det(cell)) or np.nan  # Å³
    return sigma / volume  # [3, 3]
