"""How far a linear reading of the mapper's inputs gets without a language model: what stage 2 is compared with. F3."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from collm_fast.data.dataset import Split
from collm_fast.evaluate import sigmoid
from collm_fast.models.cf.frozen import CFModel
from collm_fast.models.mapper import IdStatistics

# Name: what is read. `logistic` with a suffix reads what the mapper of the stage 2 row with that suffix reads.
FORMS = {
    "logistic": ("embedding",),
    "logistic+stats": ("embedding", "statistics"),
    "logistic+pair": ("embedding", "product"),
    "logistic+stats+pair": ("embedding", "statistics", "product"),
    "logistic, product alone": ("product",),
    "logistic, statistics and product": ("statistics", "product"),
}
# Strong enough for as many columns as a demo has rows.
RIDGE = 10.0


def control_scores(cf: CFModel, statistics: IdStatistics, train: Split, test: Split) -> dict[str, NDArray[np.float64]]:
    """Logits [len(test)] of each of `FORMS`, fitted to the rows that stage 2 trains on."""
    user, item = cf.user.numpy(), cf.item.numpy()
    of_user, of_item = statistics.user.numpy(), statistics.item.numpy()

    def columns(split: Split) -> dict[str, NDArray[np.float64]]:
        u, i = user[split.uid], item[split.iid]
        known = np.c_[of_user[split.uid], of_item[split.iid]]
        return {"embedding": np.c_[u, i], "product": u * i, "statistics": known}

    before, after = columns(train), columns(test)
    return {
        name: logistic_scores(
            np.concatenate([before[part] for part in parts], axis=1),
            train.label,
            np.concatenate([after[part] for part in parts], axis=1),
            RIDGE,
        )
        for name, parts in FORMS.items()
    }


def logistic_scores(train: ArrayLike, label: ArrayLike, test: ArrayLike, ridge: float = 1.0) -> NDArray[np.float64]:
    """Logits of a ridge-regularised logistic regression on standardised columns, by Newton's method.

        min_w  sum_i log(1 + exp(-(2 label_i - 1) (x_i w + b))) + ridge/2 |w|^2

    Args:
        train: [n, k] features; label: [n] 0 or 1; test: [m, k].
    Returns: [m] float64.
    Source: McCullagh and Nelder, Generalized Linear Models (1989), section 4.4.
    """
    x, y, z = np.asarray(train, np.float64), np.asarray(label, np.float64), np.asarray(test, np.float64)
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    x = np.c_[(x - mean) / scale, np.ones(len(x))]
    z = np.c_[(z - mean) / scale, np.ones(len(z))]
    penalty = np.full(x.shape[1], ridge)
    penalty[-1] = 1e-6  # the intercept is free, up to what keeps one class finite
    weight = np.zeros(x.shape[1])
    for _ in range(50):
        p = sigmoid(x @ weight)
        gradient = x.T @ (p - y) + penalty * weight
        curvature = (x * np.maximum(p * (1 - p), 1e-9)[:, None]).T @ x + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        weight -= step
        if np.abs(step).max() < 1e-9:
            break
    return np.asarray(z @ weight)
