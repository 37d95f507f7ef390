"""The built-in judge of generated texts: logistic regression on sentence embeddings, which knows its own accuracy.

Any callable from a list of texts to one number for each is a judge; this one is learnt from labelled texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ..align.linear import Seed
from ..directions.labels import auc, grouped_folds
from ..numeric import as_matrix

PACKAGED = "all-MiniLM-L6-v2"
MAX_TOKENS = 256  # what the packaged encoder was trained for; the rest of a text is not read
BATCH = 64
PENALTIES = (0.1, 1.0, 10.0, 100.0)  # scikit-learn's C, strongest penalty first


class SentenceJudge(BaseEstimator):
    """Tells how much a text is of the positive class, as log-odds.

    Logistic regression with an L2 penalty, on embeddings that are centred and divided by their root mean square norm.
    The penalty has the least log loss on held-out groups. Accuracy and AUC are of texts that neither the weights nor
    the penalty were learnt from (nested cross-validation): they say what a judgement of like texts is worth, and
    nothing of texts of another kind.

    Args:
        encoder: what embeds a text. None: the packaged sentence encoder all-MiniLM-L6-v2. A hub id or folder: a
            transformers encoder. Either runs on the CPU in float32, and its last states are averaged over all tokens
            but padding and divided by their norm. A callable from a list of strings to an array `[text, d]`: taken as
            it is.
        folds: of the cross-validation.
        random_state: seed of the folds.

    Attributes:
        accuracy_: share of the held-out texts on the right side of 0.
        auc_: area under the ROC curve within a fold, averaged over held-out texts.
        n_: how many texts were held out and judged. Folds without both classes are left out, so it may be fewer than
            all.
        majority_: share of the larger class among them, which is the accuracy of a constant judge.
        C_: the penalty chosen, one of `PENALTIES`.
        coef_, intercept_: of the log-odds, on embeddings as they are: float64 `[d]`, and a number.
    """

    def __init__(
        self, encoder: str | Path | Callable[[list[str]], Any] | None = None, folds: int = 5, random_state: Seed = 0
    ) -> None:
        self.encoder = encoder
        self.folds = folds
        self.random_state = random_state

    def fit(self, texts: Any, labels: Any, groups: Any = None) -> SentenceJudge:
        """Learn from labelled texts.

        Args:
            texts: strings; an empty one is a text like any other.
            labels: one for each text, of two values; the larger is the positive class.
            groups: one for each text: texts of a group (a pair, say) are held out together. None: each by itself.

        Raises:
            ValueError: no texts or no strings, labels that are not one for each text or not of two values, fewer than
                two folds, embeddings that are all the same or hold NaN, or too few texts or groups to hold any out.
        """
        if self.folds < 2:
            raise ValueError(f"folds is {self.folds}: at least 2 are needed to hold texts out.")
        texts = _strings(texts)
        if not texts:
            raise ValueError("There are no texts to learn from.")
        y = _binary(labels, len(texts))
        X = self.encode(texts).numpy()
        if not np.ptp(X, axis=0).any():
            raise ValueError(f"The encoder gives all {len(texts)} texts the same embedding.")
        groups = None if groups is None else np.asarray(groups)
        right, areas, found = 0, 0.0, []
        for train, test in self._split(y, groups):
            inner = None if groups is None else groups[train]
            coef, intercept = _logistic(X[train], y[train], self._penalty(X[train], y[train], inner))
            odds = X[test] @ coef + intercept
            right += int(((odds > 0) == y[test]).sum())
            areas += len(test) * auc(torch.as_tensor(y[test]), torch.as_tensor(odds))
            found.append(y[test])
        if not found:
            raise ValueError(
                f"No fold of the {len(texts)} texts has both classes in what is held out and in the rest: "
                "give more texts, or more groups."
            )
        held = np.concatenate(found)
        self.n_ = len(held)
        self.accuracy_, self.auc_ = right / self.n_, areas / self.n_
        self.majority_ = float(max(held.mean(), 1 - held.mean()))
        self.C_ = self._penalty(X, y, groups)
        self.coef_, self.intercept_ = _logistic(X, y, self.C_)
        return self

    def __call__(self, texts: Any) -> Float[Tensor, " text"]:
        """Log-odds of the positive class `[text]`, float64, nats; they include the class shares of the texts at fit.

        Raises:
            NotFittedError: before `fit`.
            ValueError: no strings, or embeddings of another width than at fit.
        """
        check_is_fitted(self)
        texts = _strings(texts)
        if not texts:
            return torch.zeros(0, dtype=torch.float64)
        X = self.encode(texts)
        if X.shape[1] != len(self.coef_):
            raise ValueError(f"The encoder gives embeddings of width {X.shape[1]}, but gave {len(self.coef_)} at fit.")
        return X @ torch.as_tensor(self.coef_) + self.intercept_

    def encode(self, texts: Any) -> Float[Tensor, "text d"]:
        """Embeddings `[text, d]`, float64. Needs no fit.

        Raises:
            ValueError: no texts or no strings, or a callable's output is not one finite row for each text.
        """
        texts = _strings(texts)
        if not texts:
            raise ValueError("There are no texts to encode.")
        if callable(self.encoder):
            found = as_matrix(self.encoder(texts), "The encoder's output").cpu()
            if len(found) != len(texts):
                raise ValueError(f"The encoder gives {len(found)} rows for {len(texts)} texts.")
            return found
        return as_matrix(_embed(None if self.encoder is None else str(self.encoder), texts), "The encoder's output")

    def describe(self) -> str:
        """One line: how good the judge is, on how many texts."""
        check_is_fitted(self)
        return (
            f"accuracy {self.accuracy_:.2f}, AUC {self.auc_:.2f} on {self.n_} held-out texts "
            f"(a constant judge: accuracy {self.majority_:.2f})"
        )

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        head = super().__repr__(N_CHAR_MAX)
        return f"{head}: {self.describe()}" if hasattr(self, "coef_") else head

    def _split(self, y: np.ndarray, groups: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return grouped_folds(y, groups, self.folds, self.random_state)

    def _penalty(self, X: np.ndarray, y: np.ndarray, groups: Any) -> float:
        """C with the least log loss on held-out groups; the strongest penalty if none can be held out."""
        losses = np.zeros(len(PENALTIES))
        for train, test in self._split(y, groups):
            for i, C in enumerate(PENALTIES):
                coef, intercept = _logistic(X[train], y[train], C)
                losses[i] += np.logaddexp(0, (1 - 2 * y[test]) * (X[test] @ coef + intercept)).sum()
        return PENALTIES[int(losses.argmin())]


def _strings(texts: Any) -> list[str]:
    if isinstance(texts, str):
        raise ValueError("One string was given where a list of texts is needed: write [text].")
    found = list(texts)
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise ValueError(f"Text {i} is no string but a {type(text).__name__}: a judge reads what a model wrote.")
    return found


def _binary(labels: Any, count: int) -> Float[np.ndarray, " text"]:
    """1 for the larger of two labels, else 0."""
    array = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    if array.shape != (count,):
        raise ValueError(f"labels must have one entry for each of the {count} texts, but has shape {array.shape}.")
    values = np.unique(array)
    positive = array == values[-1]  # nowhere, if that is NaN
    if len(values) != 2 or not positive.any():
        shown = ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")
        raise ValueError(f"labels must hold two classes, but the {count} texts have {len(values)}: {shown}.")
    return positive.astype(np.float64)


def _logistic(X: np.ndarray, y: np.ndarray, C: float) -> tuple[np.ndarray, float]:
    from sklearn.linear_model import LogisticRegression

    mean = X.mean(0)
    # C depends on the unit of the embeddings, which is the encoder's own
    scale = float(np.sqrt(np.square(X - mean).sum(1).mean())) or 1.0
    model = LogisticRegression(C=C, max_iter=10_000).fit((X - mean) / scale, y)
    coef = model.coef_[0] / scale
    return coef, float(model.intercept_[0] - mean @ coef)


@lru_cache(maxsize=1)  # not an attribute, so that a judge is small in a pickle
def _load(encoder: str | None) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    from ..models.packaged import model_path

    where = encoder if encoder is not None else str(model_path(PACKAGED))
    return AutoModel.from_pretrained(where, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(where)


def _embed(encoder: str | None, texts: list[str]) -> Float[Tensor, "text d"]:
    """Mean of the last states over real tokens, of unit norm."""
    model, tokenizer = _load(encoder)
    limit = min(MAX_TOKENS, tokenizer.model_max_length)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding in a batch
    rows: list[Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        call = tokenizer(
            [texts[i] for i in batch], padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        with torch.no_grad():
            states = model(**call).last_hidden_state
        real = call["attention_mask"][..., None].to(states.dtype)
        means = (states * real).sum(1) / real.sum(1).clamp(min=1)
        for i, row in zip(batch, torch.nn.functional.normalize(means, dim=-1), strict=True):
            rows[i] = row
    return torch.stack(rows)
