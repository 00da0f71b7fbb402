"""The loss as a function F(t) of one number: its power series, the bound on the series' rest, and the direct formula.

A unit that moves by t moves every logit along one column v of the last Linear, dz = t v. With q as in `loss.py` and
u_c = v_c - v_y, y the label,

    F(t) = log1p(S(t))        S(t) = sum_c q_c expm1(t u_c) = sum_k m_k t^k / k!        m_k = sum_c q_c u_c^k

and log1p(S) has the cumulants kappa_k / k! as its coefficients. The series is used where |t| R, R = max |u|, is at most
`REACH_SHORT` (order 5) or `REACH_LONG` (order 8): there what it leaves out is at most 1e-6 of t^2 kappa_2. Beyond it
`direct_loss` computes F(t) from the definition.
"""

import math

import numpy as np

from ablation.engine.compiled import kernel

SHORT_ORDER, LONG_ORDER = 5, 8  # orders of the two polynomials
ORDERS = LONG_ORDER
# A remainder of at most 1e-6 of t^2 kappa_2, by C_(K+1) / (K+1)! x^(K-1) e^x for x = |t| R.
REACH_SHORT, REACH_LONG = np.float32(0.092), np.float32(0.347)
REST_SHORT, REST_LONG = 9.125 / 720, 420.375 / 362880
LARGE_SUM = 0.5  # |S| above which log1p(S) is a difference of two losses, as in loss.py
SMALL_EXPONENT = np.float32(0.25)  # |z| up to which the polynomial of expm1 is used


@kernel
def moments_of_column(q, v, label, m):
    """m[k] = sum_c q_c u_c^(k+1), u = v - v_label."""
    own = v[label]
    m1 = m2 = m3 = m4 = m5 = m6 = m7 = m8 = np.float32(0)
    for c in range(q.shape[0]):
        u = v[c] - own
        p = q[c] * u
        m1 += p
        p *= u
        m2 += p
        p *= u
        m3 += p
        p *= u
        m4 += p
        p *= u
        m5 += p
        p *= u
        m6 += p
        p *= u
        m7 += p
        p *= u
        m8 += p
    m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7] = m1, m2, m3, m4, m5, m6, m7, m8


@kernel
def moments_of_logit(q, unit, label, m):
    """m[k] where only logit `unit` moves: u = 1 for that logit; if it is the label's, u = -1 for all others."""
    total, sign = np.float64(0), 1.0
    if unit == label:
        sign = -1.0
        for c in range(q.shape[0]):
            total += q[c]
    else:
        total = np.float64(q[unit])
    for k in range(ORDERS):
        m[k] = total * sign ** (k + 1)


@kernel
def series_of_log(m, kappa):
    """Coefficients of log1p(sum_k m_k t^k / k!): cumulants kappa_k = m_k - sum_j C(k-1,j-1) kappa_j m_(k-j), over k!"""
    for k in range(1, ORDERS + 1):
        total, choose = m[k - 1], 1.0
        for j in range(1, k):
            total -= choose * kappa[j - 1] * m[k - j - 1]
            choose = choose * (k - j) / j
        kappa[k - 1] = total
    factorial = 1.0
    for k in range(1, ORDERS + 1):
        factorial *= k
        kappa[k - 1] /= factorial


@kernel
def expm1_small(z):
    """expm1(z) for |z| <= 1/4, to float32's last digit: z (1 + z/2 (1 + z/3 (...)))."""
    one = np.float32(1)
    high = one + z * np.float32(1 / 6) * (one + z * np.float32(1 / 7))
    low = one + z * np.float32(1 / 4) * (one + z * np.float32(1 / 5) * high)
    return z * (one + z * np.float32(1 / 2) * (one + z * np.float32(1 / 3) * low))


@kernel
def loss_of_column(t, width, q, z, v, label):
    """log1p(sum_c q_c expm1(t u_c)) for one pair, in float64; no |u_c| is larger than `width`.

    expm1 by its series; beyond 1/4 of an eighth of z, then doubled three times, expm1(2h) = expm1(h) (2 + expm1(h)),
    which does not cancel. Large changes are a difference of losses, from the logits z.
    """
    step, own, total = np.float32(t), v[label], np.float32(0)
    reach = abs(step) * width
    if reach <= SMALL_EXPONENT:
        for c in range(q.shape[0]):
            total += q[c] * expm1_small(step * (v[c] - own))
    elif reach <= 8 * SMALL_EXPONENT:
        step *= np.float32(0.125)
        for c in range(q.shape[0]):
            e = expm1_small(step * (v[c] - own))
            e *= np.float32(2) + e
            e *= np.float32(2) + e
            e *= np.float32(2) + e
            total += q[c] * e
    else:
        return large_loss_of_column(t, z, v, label)
    if not abs(total) <= LARGE_SUM:
        return large_loss_of_column(t, z, v, label)
    return math.log1p(np.float64(total))


@kernel
def large_loss_of_column(t, z, v, label):
    """F(t) in float64, from the logits: p_c expm1(t u_c), or for large t u_c a difference; where the sum is large
    a difference of two losses."""
    own = np.float64(v[label])
    top, moved_top = -np.inf, -np.inf
    for c in range(z.shape[0]):
        top = max(top, z[c])
        moved_top = max(moved_top, z[c] + t * np.float64(v[c]))
    before, after = 0.0, 0.0
    for c in range(z.shape[0]):
        before += math.exp(z[c] - top)
        after += math.exp(z[c] + t * np.float64(v[c]) - moved_top)
    before, after = math.log(before) + top, math.log(after) + moved_top
    total = 0.0
    for c in range(z.shape[0]):
        moved = t * (np.float64(v[c]) - own)
        if abs(moved) < 1:
            total += math.exp(z[c] - before) * math.expm1(moved)
        else:
            total += math.exp(z[c] - before + moved) - math.exp(z[c] - before)
    if abs(total) <= LARGE_SUM:
        return math.log1p(total)
    return (after - before) - t * own


@kernel
def loss_of_logit(t, unit, q, z, label):
    """F(t) where only logit `unit` moves: log1p(q_unit expm1(t)), or log1p(sum_c q_c expm1(-t)) for the label's."""
    total, sign = np.float64(q[unit]), 1.0
    if unit == label:
        total, sign = 0.0, -1.0
        for c in range(q.shape[0]):
            total += np.float64(q[c])
    total *= math.expm1(sign * t)
    if abs(total) <= LARGE_SUM:
        return math.log1p(total)
    top = max(z.max(), z[unit] + t)
    before, after = 0.0, 0.0
    for c in range(z.shape[0]):
        before += math.exp(z[c] - top)
        after += math.exp(z[c] + (t if c == unit else 0.0) - top)
    return math.log(after) - math.log(before) - (t if unit == label else 0.0)


@kernel
def series_of(column, q, label, m, kappa):
    """The coefficients of one (unit, example), in `kappa`. `m` (ORDERS): scratch."""
    if column.is_logit:
        moments_of_logit(q, column.unit, label, m)
    else:
        moments_of_column(q, column.values, label, m)
    series_of_log(m, kappa)


@kernel
def direct_loss(t, column, batch, n):
    """F(t) from its definition."""
    if column.is_logit:
        return loss_of_logit(np.float64(t), column.unit, batch.q[n], batch.z[n], batch.labels[n])
    return loss_of_column(np.float64(t), column.range, batch.q[n], batch.z[n], column.values, batch.labels[n])


# --- the series -------------------------------------------------------------------------------------------------------


@kernel
def short_series(c, k):
    """The coefficients of one pair (unit, example)."""
    return c[k, 0], c[k, 1], c[k, 2], c[k, 3], c[k, 4]


@kernel
def long_series(c, k):
    """The coefficients of one pair (unit, example)."""
    return c[k, 0], c[k, 1], c[k, 2], c[k, 3], c[k, 4], c[k, 5], c[k, 6], c[k, 7]


@kernel
def short_sum(t, a):
    """sum_k a_k t^k, the first of order 1."""
    return t * (a[0] + t * (a[1] + t * (a[2] + t * (a[3] + t * a[4]))))


@kernel
def long_sum(t, a):
    """sum_k a_k t^k, the first of order 1."""
    high = a[4] + t * (a[5] + t * (a[6] + t * a[7]))
    return t * (a[0] + t * (a[1] + t * (a[2] + t * (a[3] + t * high))))


@kernel
def loss_of(t, c, column, batch, n):
    """F(t): by the series within its reach, else from its definition."""
    if abs(t) * column.range <= REACH_LONG:
        return np.float64(long_sum(t, c))
    return direct_loss(t, column, batch, n)


@kernel
def rest_of_series(reach, width, kappa_2):
    """A bound on what one pair's series leaves out up to |t| = reach / width, in nats; no |u_c| is above `width`."""
    reach = min(reach, REACH_LONG)
    if width == 0:
        return 0.0
    factor = REST_SHORT * reach ** (SHORT_ORDER - 1) if reach <= REACH_SHORT else REST_LONG * reach ** (LONG_ORDER - 1)
    return factor * (reach / width) ** 2 * kappa_2 * math.exp(reach)
