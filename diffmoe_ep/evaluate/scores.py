"""Numbers that compare two sets of features."""

import numpy as np
import torch
from numpy.typing import NDArray

from diffmoe_ep.config import ConfigError
from diffmoe_ep.evaluate.features import Features

Labels = NDArray[np.int64]  # (n,)


def frechet_distance(a: Features, b: Features) -> float:
    """Fréchet distance of the normal distributions fitted to two feature sets, (n, F) and (m, F).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) with unbiased covariances A, B. For any factors A = R_a' R_a and
    B = R_b' R_b the last trace is the sum of the singular values of R_a R_b'. The centred features themselves are such
    factors, so no covariance is formed nor any root taken of an eigenvalue that is zero but for rounding: singular
    covariances (constant pixels, fewer samples than features) lose no digits. It falls as sets grow: compare at equal
    counts.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a Fréchet distance needs at least 2 samples on each side, not {len(a)} and {len(b)}")
    difference = a.mean(0) - b.mean(0)  # (F,)
    factor_a, factor_b = _covariance_factor(a), _covariance_factor(b)
    cross = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    distance = difference @ difference + np.square(factor_a).sum() + np.square(factor_b).sum() - 2 * cross
    return max(float(distance), 0.0)


def _covariance_factor(features: Features) -> Features:
    """A small R with R' R = the unbiased covariance of the features, (min(n, F), F)."""
    centred = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    factor: Features = np.linalg.qr(centred, mode="r")  # type: ignore[assignment]  # NumPy's stubs miss this mode
    return factor


def classifier_accuracy(train_x: Features, train_y: Labels, x: Features, y: Labels) -> float:
    """Share of x (n, F) that a support vector classifier, trained on (train_x, train_y), puts into the classes y (n,).

    Radial kernel, its width set by the training features' variance, so any units will do; it draws nothing at random.
    Raises ConfigError without scikit-learn.
    """
    try:
        from sklearn.svm import SVC
    except ImportError as error:
        raise ConfigError(
            "scoring needs scikit-learn, which is not installed: pip install 'diffmoe_ep[eval]'"
        ) from error
    classifier = SVC(kernel="rbf", gamma="scale", C=1.0).fit(train_x, train_y)
    return float((classifier.predict(x) == y).mean())


def nearest_distance(x: Features, reference: Features, chunk: int = 256) -> Features:
    """Euclidean distance of every row of x (n, F) to its nearest row of reference (m, F): (n,).

    Differences are squared one by one, not through a matrix product, so the distance of an exact copy is exactly 0.
    """
    targets = torch.from_numpy(reference)
    nearest = [
        torch.cdist(rows, targets, compute_mode="donot_use_mm_for_euclid_dist").min(1).values  # (chunk,)
        for rows in torch.from_numpy(x).split(chunk)
    ]
    return torch.cat(nearest).numpy()
