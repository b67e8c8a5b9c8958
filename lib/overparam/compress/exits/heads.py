"""The exits of one encoder: fitted, calibrated, saved, loaded and run."""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.nn import functional
from transformers import PreTrainedModel

from overparam.compress.exits import calibration, rules
from overparam.compress.exits.running import early
from overparam.compress.exits.segments import Segments
from overparam.models import blocks
from overparam.support import files

Class = str | int
_STRENGTHS = (0.3, 0.03, 0.003)  # of the squared weights, relative to the mean cross entropy
_HELD_OUT = 5  # one text in five chooses the strength
_STEPS = 150
_SAMPLE = 64  # numbers of each weight that tell models apart
_known: weakref.WeakKeyDictionary[Any, tuple[int, str]] = weakref.WeakKeyDictionary()


class Ran(NamedTuple):
    """What a run gives: a class, its probability and the number of computed blocks, of each text."""

    classes: list[Class]
    probabilities: NDArray[np.float64]
    depths: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Exits:
    """A linear classifier after each block of one encoder, and the rule by which texts leave.

    Attributes:
        weights: float32 [exits, hidden, classes].
        biases: float32 [exits, classes].
        classes: The labels.
        model: Fingerprint of the encoder.
        pooling: Of its hidden states, as in `depth.layer_embeddings`.
        rule: One of `RULES`.
        threshold: Confidence from which on a text leaves; infinity: none leaves early.
        learned: From `predictor`, for the rule "learned".
    """

    weights: torch.Tensor
    biases: torch.Tensor
    classes: tuple[Class, ...]
    model: str
    pooling: str = "mean"
    rule: str = "probability"
    threshold: float = float("inf")
    learned: NDArray[np.float64] | None = None

    def logits(self, states: ArrayLike) -> NDArray[np.float32]:
        """Return the logits of every exit, [texts, exits, classes].

        Args:
            states: Pooled states of every depth, from `depth.layer_embeddings`, [texts, exits + 1, hidden].

        Raises:
            ValueError: They are of another width or number of layers.
        """
        x = _at_exits(states)
        exits, width, _ = self.weights.shape
        if x.shape[:1] + x.shape[2:] != (exits, width):
            raise ValueError(
                f"these exits are of {exits} layers and width {width}, the states of {len(x)} layers and width "
                f"{x.shape[2]}"
            )
        found: NDArray[np.float32] = torch.baddbmm(self.biases[:, None], x, self.weights).numpy()
        return found.transpose(1, 0, 2)

    def with_rule(self, rule: str, states: ArrayLike | None = None) -> Exits:
        """Return the same exits with another rule and no threshold.

        Args:
            rule: One of `RULES`.
            states: Of texts without labels that the exits were not trained on; the rule "learned" learns from them.

        Raises:
            ValueError: The rule is unknown, or "learned" has nothing to learn from.
        """
        if rule not in rules.RULES:
            raise ValueError(f"rule must be one of {', '.join(rules.RULES)}, got {rule!r}")
        if rule == "learned" and states is None:
            raise ValueError("the rule 'learned' needs states of texts that the exits were not trained on")
        learned = rules.predictor(self.logits(states)) if rule == "learned" and states is not None else None
        return replace(self, rule=rule, threshold=float("inf"), learned=learned)

    def calibrated(
        self,
        states: ArrayLike,
        labels: ArrayLike | None,
        *,
        alpha: float,
        delta: float = 0.1,
        method: str = "ltt",
        risk: str = "newly wrong",
    ) -> Exits:
        """Return the same exits with the threshold that keeps the risk below `alpha`.

        Args:
            states: Of texts that neither trained the exits nor will test them.
            labels: Their labels; None for the risk "disagreement".
            alpha: See `calibrate`.
            delta: See `calibrate`.
            method: One of `METHODS`.
            risk: One of `RISKS`.

        Raises:
            ValueError: As `calibrate`; or labels that the exits were not trained on.
        """
        logits = self.logits(states)
        numbers = None if labels is None else self.numbers(labels)
        loss = calibration.losses(logits.argmax(-1), numbers, risk)
        left = rules.leave(rules.confidences(logits, self.rule, self.learned), calibration.THRESHOLDS)
        place = calibration.calibrate(calibration.risks(left, loss), alpha=alpha, delta=delta, method=method)
        threshold = float(calibration.THRESHOLDS[place])
        if (left[place] == logits.shape[1] - 1).all():
            threshold = float("inf")
            warnings.warn(
                f"no threshold of the rule {self.rule!r} saves anything at alpha = {alpha:g}: every text runs at full "
                "depth",
                stacklevel=2,
            )
        return replace(self, threshold=threshold)

    def numbers(self, labels: ArrayLike) -> NDArray[np.int64]:
        """Return labels as numbers of classes.

        Raises:
            ValueError: A label is not among the classes.
        """
        place = {label: number for number, label in enumerate(self.classes)}
        plain = np.asarray(labels).tolist()
        if unseen := sorted({label for label in plain if label not in place}, key=str):
            raise ValueError(f"the exits were not trained on {unseen[:3]}: their classes are {self.classes}")
        return np.array([place[label] for label in plain], dtype=np.int64)

    def run(
        self, model: PreTrainedModel | Segments, batch: Mapping[str, Any], *, regroup: bool = True
    ) -> Ran:
        """Classify texts, each with as many blocks as it needs.

        Args:
            model: The encoder that the exits were fitted to, in evaluation mode; or its `Segments`.
            batch: From its tokenizer: `input_ids` and `attention_mask`, [texts, tokens].
            regroup: See `early`.

        Raises:
            ValueError: The model is another one, or cannot be stopped.
        """
        self.check(model.source if isinstance(model, Segments) else model)
        n, exits = len(batch["input_ids"]), len(self.weights)
        logits = np.empty((n, len(self.classes)))
        depths = np.full(n, exits)
        streak, before = np.zeros(n, dtype=np.int64), np.full(n, -1)

        def visit(exit: int, rows: torch.Tensor, states: torch.Tensor) -> torch.Tensor | None:
            found = torch.addmm(self.biases[exit], states.float().cpu(), self.weights[exit]).double().numpy()
            at = rows.numpy()
            predicted = found.argmax(-1)
            streak[at] = np.where(predicted == before[at], streak[at], 0) + 1
            before[at] = predicted
            logits[at], depths[at] = found, exit + 1
            if exit == exits - 1:
                return None
            sure = rules.confidence(found, streak[at], exit, exits, self.rule, self.learned)
            return torch.from_numpy(sure >= self.threshold)

        stopping = model.early if isinstance(model, Segments) else partial(early, model)
        stopping(
            batch["input_ids"],
            batch["attention_mask"],
            visit,
            pooling=self.pooling,
            exits=None if np.isfinite(self.threshold) else range(exits - 1, exits),
            regroup=regroup,
        )
        chances = np.exp(logits - logits.max(-1, keepdims=True))
        numbers = logits.argmax(-1)
        best = (chances / chances.sum(-1, keepdims=True))[np.arange(n), numbers]
        return Ran([self.classes[number] for number in numbers], best, depths)

    def check(self, model: PreTrainedModel) -> None:
        """Refuse another model than that which the exits were fitted to.

        Raises:
            ValueError: It is of another size, or its weights are others.
        """
        exits, width, _ = self.weights.shape
        own = (len(blocks(model).layers), model.config.get_text_config().hidden_size)
        if own != (exits, width):
            raise ValueError(
                f"these exits are of a model of {exits} layers and width {width}, {type(model).__name__} has {own[0]} "
                f"layers and width {own[1]}"
            )
        if fingerprint(model) != self.model:
            raise ValueError("these exits were fitted to a model with other weights: fit exits to this one")

    def save(self, folder: Path | str) -> Path:
        """Save as exits.safetensors and exits.json in a folder, which is made."""
        from safetensors.torch import save

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        arrays = {"weights": self.weights.contiguous(), "biases": self.biases.contiguous()}
        if self.learned is not None:
            arrays["learned"] = torch.from_numpy(self.learned)
        plain = {name: each for name, each in asdict(self).items() if name not in {*arrays, "learned"}}
        plain["threshold"] = None if np.isinf(self.threshold) else self.threshold
        files.write_atomic(path / "exits.safetensors", save(arrays))
        files.write_atomic(path / "exits.json", json.dumps(plain, indent=1).encode())
        return path


def load(folder: Path | str) -> Exits:
    """Load exits that `Exits.save` wrote.

    Raises:
        FileNotFoundError: There are none.
    """
    from safetensors.torch import load_file

    path = Path(folder)
    if not (path / "exits.json").is_file():
        raise FileNotFoundError(f"no exits in {path}: a folder that Exits.save wrote has an exits.json")
    plain = json.loads((path / "exits.json").read_text(encoding="utf-8"))
    arrays = load_file(path / "exits.safetensors")
    learned = arrays.pop("learned", None)
    threshold = float("inf") if plain["threshold"] is None else plain["threshold"]
    plain |= {"classes": tuple(plain["classes"]), "threshold": threshold}
    return Exits(**arrays, **plain, learned=None if learned is None else learned.numpy())


def fit(
    states: ArrayLike, labels: ArrayLike, *, of: PreTrainedModel, pooling: str = "mean", seed: int = 0
) -> Exits:
    """Fit a linear exit after every block: logistic regression on standardised pooled states.

    The strength of the penalty on weights is chosen for each exit by the cross entropy of one text in five.

    Args:
        states: From `depth.layer_embeddings` with this pooling, all depths. float32 [texts, layers + 1, hidden]
        labels: Of the texts.
        of: The encoder.
        pooling: Of the states.
        seed: Chooses the texts that choose the strength.

    Raises:
        ValueError: There is only one class, or the states are not those of the model's layers.
    """
    plain = np.asarray(labels)
    classes, numbers = np.unique(plain, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"exits need texts of at least 2 classes, got {len(plain)} of {classes.tolist()}")
    shape = (len(plain), len(blocks(of).layers) + 1, of.config.get_text_config().hidden_size)
    if np.shape(states) != shape:
        raise ValueError(
            f"states must be [texts, layers + 1, hidden] = {list(shape)}, got {list(np.shape(states))}"
        )
    targets = functional.one_hot(torch.from_numpy(numbers), len(classes)).float()
    weights, biases = _chosen(_at_exits(states), targets, seed)
    return Exits(weights, biases, tuple(classes.tolist()), fingerprint(of), pooling)


def distilled(exits: Exits, states: ArrayLike, *, seed: int = 0) -> Exits:
    """Fit exits to the last exit's probabilities; that stays as it is (self-distillation, FastBERT, arXiv 2004.02178).

    Args:
        exits: From `fit`.
        states: Of texts without labels, and of those that trained the exits.
        seed: As in `fit`.
    """
    full = torch.from_numpy(np.ascontiguousarray(exits.logits(states)[:, -1])).softmax(-1)
    weights, biases = _chosen(_at_exits(states), full, seed)
    weights[-1], biases[-1] = exits.weights[-1], exits.biases[-1]
    return replace(exits, weights=weights, biases=biases, threshold=float("inf"), learned=None)


def fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of the first numbers of each weight: it tells models of one size apart."""
    changes = sum(each._version for each in model.parameters())
    if (known := _known.get(model)) and known[0] == changes:
        return known[1]
    digest = sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().flatten()[:_SAMPLE].float().cpu().numpy().tobytes())
    _known[model] = (changes, digest.hexdigest())
    return _known[model][1]


def _at_exits(states: ArrayLike) -> torch.Tensor:
    """States after each block, float32 [exits, texts, hidden]: those of the embedding layer are left out."""
    return torch.from_numpy(np.asarray(states, dtype=np.float32)[:, 1:].transpose(1, 0, 2).copy())


def _chosen(x: torch.Tensor, targets: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and biases of all exits, each with the strength that suits held-out texts best."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(targets)))
    held, rest = order[::_HELD_OUT], order[torch.arange(len(order)) % _HELD_OUT > 0]
    scores = []
    for strength in _STRENGTHS:
        weights, biases = regressions(x[:, rest], targets[rest], torch.full((len(x),), strength))
        scores.append(_cross_entropy(torch.baddbmm(biases[:, None], x[:, held], weights), targets[held]))
    best = torch.tensor(_STRENGTHS)[torch.stack(scores).argmin(0)]
    return regressions(x, targets, best)


def regressions(
    x: torch.Tensor, targets: torch.Tensor, strengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve several multinomial logistic regressions at once, on standardised inputs.

    Each minimises its mean cross entropy plus half its strength times the sum of squared weights; scikit-learn's C is
    1 / (strength · texts).

    Args:
        x: float32 [regressions, texts, inputs].
        targets: Probabilities of classes, [texts, classes].
        strengths: [regressions].

    Returns:
        Weights [regressions, inputs, classes] and biases [regressions, classes], for inputs as they are.
    """
    mean, deviation = x.mean(1, keepdim=True), x.std(1, correction=0, keepdim=True).clamp_min(1e-6)
    z = (x - mean) / deviation
    weights = torch.zeros(len(x), x.shape[2], targets.shape[1], requires_grad=True)
    biases = torch.zeros(len(x), targets.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS(
        [weights, biases], max_iter=_STEPS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Any:
        solver.zero_grad()
        penalty = 0.5 * (strengths * weights.square().sum((1, 2))).sum()
        total = _cross_entropy(torch.baddbmm(biases[:, None], z, weights), targets).sum() + penalty
        total.backward()  # type: ignore[no-untyped-call]
        return total

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[no-untyped-call]
    plain = weights.detach() / deviation.mT
    return plain, biases.detach() - (mean @ plain).squeeze(1)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over texts, [exits]; logits are [exits, texts, classes]."""
    return -(targets * logits.log_softmax(-1)).sum(-1).mean(1)
