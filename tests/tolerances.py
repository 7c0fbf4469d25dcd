"""The one table of tolerances. Tests never widen it.

The rule for a result that is not exact: measured against long double, on the same inputs,

    our largest error <= torch's own largest error (same dtype, its most accurate way) + SLACK ulps of the scale

where an ulp is the eps of the output's dtype (fp32, or fp64 for fp64) and the scale is the largest magnitude a score
can have: max |x| |y| for dot, 1 for cosine and pearson, max (|x| + |y|) and its square for distances.
"""

from __future__ import annotations

# In ulps of the scale.
SLACK: dict[str, float] = {
    "dot": 1.0,
    "cosine": 2.0,
    "pearson": 2.0,
    "euclidean": 1.0,
    "sqeuclidean": 2.0,
}

# Distances of rows that nearly coincide, relative to the distance itself: it is evaluated from differences.
CLOSE_ROWS_RELATIVE: float = 4e-7

# The specification against rationals, in ulps of fp64 of the score's scale, for rows of small integers, whose sums are
# exact: a norm is one rounding, so are their product, and the quotient.
SPECIFICATION_ULPS: float = 3.0

# precision="fast", fp32 arithmetic: D + FAST_EXTRA roundings, each relative to the scale of the score (see above).
FAST_EXTRA: int = 20

# gradcheck and gradgradcheck in fp64, as torch's own.
GRADCHECK: dict[str, float] = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-3}

# Temporal pooling against the specification in fp64, absolute: its states are at most 1. Gradients relative to the
# largest of their tensor; low precision by torch's own error, times this.
TEMPORAL: dict[str, float] = {"float64": 1e-12, "float32": 1e-5}
TEMPORAL_GRADIENT: float = 1e-4
TEMPORAL_LOW_PRECISION_RATIO: float = 1.5

# Contrastive losses and their gradients against the formulas in fp64, relative to the largest of their tensor.
LOSS: dict[str, float] = {"float64": 1e-11, "float32": 2e-5}
