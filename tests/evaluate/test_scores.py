import sys

import numpy as np
import pytest

from diffmoe_ep.config import ConfigError
from diffmoe_ep.evaluate.scores import classifier_accuracy, frechet_distance, nearest_distance


def _whitened(count: int, features: int, seed: int = 0) -> np.ndarray:
    """Points whose sample mean is 0 and whose sample covariance is the identity, to rounding."""
    x = np.random.default_rng(seed).standard_normal((count, features))
    x -= x.mean(0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    a, b = _whitened(200, 3), _whitened(150, 3, seed=1)
    wide, narrow = np.array([1.0, 2.0, 3.0]), np.array([0.5, 2.0, 1.0])
    distance = frechet_distance(a * wide + 1.0, b * narrow - 1.0)
    assert distance == pytest.approx(3 * 4 + ((wide - narrow) ** 2).sum(), abs=1e-10)


def test_frechet_distance_agrees_with_the_matrix_square_root():
    linalg = pytest.importorskip("scipy.linalg")
    random = np.random.default_rng(0)
    a, b = (
        random.standard_normal((60, 8)) @ random.standard_normal((8, 8)) + random.standard_normal(8) for _ in range(2)
    )
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_loses_no_digits_on_singular_covariances():
    x = _whitened(100, 2)
    flat = np.concatenate([x, np.zeros((100, 5)), x[:, :1]], 1)  # constant and repeated features
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-11)
    assert frechet_distance(flat, flat[::-1] + 0.5) == pytest.approx(8 * 0.25, abs=1e-11)
    few = np.random.default_rng(1).standard_normal((4, 50))  # fewer samples than features
    assert frechet_distance(few, 3 * few - 2 * few.mean(0)) == pytest.approx(4 * few.var(0, ddof=1).sum(), rel=1e-12)


def test_frechet_distance_needs_two_samples():
    with pytest.raises(ValueError, match="at least 2 samples"):
        frechet_distance(np.zeros((1, 3)), np.zeros((5, 3)))


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_nearest_distance_agrees_with_brute_force(chunk):
    random = np.random.default_rng(0)
    x, reference = random.standard_normal((23, 6)), random.standard_normal((40, 6))
    reference[11] = x[3]
    expected = [min(np.sqrt(((row - other) ** 2).sum()) for other in reference) for row in x]
    distances = nearest_distance(x, reference, chunk)
    np.testing.assert_allclose(distances, expected, rtol=1e-12)
    assert distances[3] == 0


def test_the_classifier_knows_real_digits_and_repeats_itself():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    unseen, seen = order[:297], order[297:]
    accuracy = classifier_accuracy(x[seen], y[seen], x[unseen], y[unseen])
    assert accuracy > 0.95
    assert accuracy == classifier_accuracy(x[seen], y[seen], x[unseen], y[unseen])
    assert classifier_accuracy(x[seen], y[seen], x[unseen], (y[unseen] + 1) % 10) < 0.05


def test_a_missing_scikit_learn_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(ConfigError, match=r"pip install 'diffmoe_ep\[eval\]'"):
        classifier_accuracy(np.zeros((2, 1)), np.array([0, 1]), np.zeros((1, 1)), np.array([0]))
