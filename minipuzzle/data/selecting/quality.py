"""A quality classifier from examples of good and bad text: hashed n-grams and a logistic regression, in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minipuzzle.data.rows import Row
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.json_files import read_json, write_json

CLASSIFIER_FILE = "quality.json"
NUM_FEATURES = 2**16
FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A linear classifier over hashed words and pairs. ``weights``: positions and values of those that are not zero."""

    weights: tuple[tuple[int, float], ...]
    bias: float
    auc: float

    def scores(self, texts: Sequence[str]) -> list[float]:
        """The probability of each text to be good."""
        if not texts:
            return []
        dense = np.zeros(NUM_FEATURES)
        places, values = zip(*self.weights, strict=True)
        dense[list(places)] = values
        logits = np.asarray(_features(texts) @ dense) + self.bias
        return [float(score) for score in 1 / (1 + np.exp(-logits))]

    def write(self, path: Path) -> None:
        """Write it to a file."""
        write_json(path, {"weights": [list(pair) for pair in self.weights], "bias": self.bias, "auc": self.auc})


def read_classifier(path: Path) -> Classifier:
    """A classifier from its file, or from the folder that holds it.

    Raises: MinipuzzleError if it is none.
    """
    record = read_json(path / CLASSIFIER_FILE if path.is_dir() else path)
    try:
        weights = tuple((int(place), float(value)) for place, value in record["weights"])
        assert weights and all(0 <= place < NUM_FEATURES for place, _ in weights)
        return Classifier(weights=weights, bias=float(record["bias"]), auc=float(record["auc"]))
    except (KeyError, TypeError, ValueError, AssertionError):
        raise MinipuzzleError(f"{path} holds no classifier of ours", "make one with `data train-quality`") from None


def _features(texts: Sequence[str]) -> Any:
    try:
        from sklearn.feature_extraction.text import HashingVectorizer
    except ImportError:
        raise MinipuzzleError("classifiers need scikit-learn", "pip install 'minipuzzle[data]'") from None
    return HashingVectorizer(n_features=NUM_FEATURES, ngram_range=(1, 2), alternate_sign=False).transform(texts)


def train_classifier(good: Sequence[Row], bad: Sequence[Row], seed: int = 0) -> Classifier:
    """A classifier that tells good from bad text; its AUC is measured on documents that it was not fitted on.

    Raises: MinipuzzleError for too few examples.
    """
    if min(len(good), len(bad)) < FOLDS:
        problem = f"there are {len(good)} good and {len(bad)} bad examples"
        raise MinipuzzleError(problem, f"give at least {FOLDS} of each; hundreds are better")
    features = _features([row.content for row in (*good, *bad)])
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    labels = np.array([1] * len(good) + [0] * len(bad))
    model = LogisticRegression(max_iter=1000, C=10.0, class_weight="balanced")
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    held_out = cross_val_predict(model, features, labels, cv=folds, method="decision_function")
    model.fit(features, labels)
    weights = model.coef_[0]
    return Classifier(
        weights=tuple((int(place), float(weights[place])) for place in np.flatnonzero(weights)),
        bias=float(model.intercept_[0]),
        auc=float(roc_auc_score(labels, held_out)),
    )
