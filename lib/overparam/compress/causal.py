"""Training a decoder on packed batches, from scratch or for a short recovery; checkpoints that resume."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import PreTrainedModel

from overparam import progress
from overparam.compress.muon import Muon

IGNORED = -100


class Batch(Protocol):
    """What a batch offers; see `data.packing.Packed`."""

    @property
    def input_ids(self) -> NDArray[np.int64]:
        """Token ids, [rows, length]."""

    @property
    def positions(self) -> NDArray[np.int64]:
        """Positions, [rows, length]."""

    @property
    def tree(self) -> NDArray[np.int64]:
        """0 where a row has nothing, [rows, length]."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """The token that follows, or `IGNORED`, [rows, length]."""

    def attends(self) -> NDArray[np.bool_]:
        """Which tokens each token may look at, [rows, length, length]."""


@dataclass(frozen=True)
class Recipe:
    """How a decoder is trained.

    Attributes:
        steps: Optimizer steps.
        accumulate: Batches a step.
        learning_rate: Peak; warm-up is linear, the decay at the end linear to zero (warm-up, stable, decay).
        warmup: Steps of the warm-up.
        decay: Steps of the decay.
        optimizer: "muon": Muon for the matrices of the blocks, AdamW for the rest; or "adamw" for all.
        weight_decay: Decoupled, on matrices.
        label_smoothing: Of the cross entropy.
        balance: Factor of the load-balancing loss, which looks at every layer by itself; 0: none.
        clip: Largest norm of the gradient.
        seed: Of the batches; the caller uses it to make them.
        version: Raised by the author of this module when its outcome changes.
    """

    steps: int
    accumulate: int = 1
    learning_rate: float = 2e-3
    warmup: int = 50
    decay: int = 0
    optimizer: Literal["muon", "adamw"] = "adamw"
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    balance: float = 0.0
    clip: float = 1.0
    seed: int = 42
    version: int = 1

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        up = min(1.0, (step + 1) / max(1, self.warmup))
        down = min(1.0, (self.steps - step) / max(1, self.decay)) if self.decay else 1.0
        return self.learning_rate * min(up, down)


@dataclass
class Log:
    """What a training leaves, one value a step.

    Attributes:
        loss: Cross entropy per predicted token, in nats, without label smoothing.
        balance: Load-balancing loss; 1 when every expert carries the same.
        tokens: Tokens seen so far, padding excluded.
        predicted: Predicted tokens so far.
        seconds: Wall time so far, pauses between runs excluded.
    """

    loss: list[float] = field(default_factory=list)
    balance: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def train(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    every: int = 200,
    at_checkpoint: Callable[[int], None] | None = None,
    compiled: bool = False,
    label: str = "training",
) -> Log:
    """Train `model` in place, all parameters that require a gradient.

    The loss is the cross entropy at positions with a label, and only their logits are computed. The attention mask
    of the batch is honoured exactly, which needs ``attn_implementation`` "eager" or "sdpa".

    Args:
        model: A decoder with its language-modelling head.
        batches: At least ``recipe.steps * recipe.accumulate`` of them, the same in every run: a run that resumes
            skips those that it has seen.
        recipe: See `Recipe`.
        checkpoint: Folder of the state; a run that finds one there goes on from it.
        every: Steps between checkpoints.
        at_checkpoint: Called with the number of steps done after each checkpoint and at the end.
        compiled: Compile the decoder with `torch.compile`; batches must then share one shape.
        label: Name of the step in the progress display.

    Raises:
        ValueError: Too few batches, a step without anything to predict, or a checkpoint of another recipe or of more
            steps.
        FloatingPointError: If the loss is not finite; says at which step.
    """
    optimizers = _optimizers(model, recipe)
    log = Log()
    if checkpoint and (found := _newest(checkpoint)):
        log = _restore(found, model, optimizers, recipe)
    decoder: Callable[..., Any] = model.get_decoder()
    if compiled:
        decoder = torch.compile(decoder, dynamic=False)
    done = len(log.loss)
    stream = islice(iter(batches), done * recipe.accumulate, None)
    before = log.seconds[-1] if log.seconds else 0.0
    started = time.perf_counter()
    model.train()
    for step in progress.track(range(done, recipe.steps), label):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
        loss, balance, tokens, predicted = _gradients(model, decoder, stream, recipe, step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        log.loss.append(loss)
        log.balance.append(balance)
        log.tokens.append(tokens + (log.tokens[-1] if log.tokens else 0))
        log.predicted.append(predicted + (log.predicted[-1] if log.predicted else 0))
        log.seconds.append(before + time.perf_counter() - started)
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            if checkpoint:
                _store(checkpoint, model, optimizers, recipe, log)
            if at_checkpoint:
                model.eval()
                at_checkpoint(step + 1)
                model.train()
    model.eval()
    return log


def _gradients(
    model: PreTrainedModel,
    decoder: Callable[..., Any],
    stream: Iterator[Batch],
    recipe: Recipe,
    step: int,
) -> tuple[float, float, int, int]:
    """Add up the gradients of one step; return loss, balance, tokens and predicted tokens."""
    batches = list(islice(stream, recipe.accumulate))
    if len(batches) < recipe.accumulate:
        raise ValueError(f"the batches ended at step {step + 1} of {recipe.steps}")
    predicted = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
    if not predicted:
        raise ValueError(f"the batches of step {step + 1} have nothing to predict")
    total = balances = 0.0
    tokens = 0
    for batch in batches:
        real = torch.from_numpy(batch.tree > 0).to(model.device)
        hidden, router_logits = hidden_states(model, batch, decoder=decoder, router_logits=recipe.balance > 0)
        labels = torch.from_numpy(batch.labels).to(model.device).flatten()
        at = (labels != IGNORED).nonzero().squeeze(1)
        logits = model.get_output_embeddings()(hidden.flatten(0, 1)[at]).float()  # [predicted, vocabulary]
        smooth = functional.cross_entropy(
            logits, labels[at], label_smoothing=recipe.label_smoothing, reduction="sum"
        )
        with torch.no_grad():
            plain = functional.cross_entropy(logits, labels[at], reduction="sum")
        loss = smooth / predicted
        if recipe.balance:
            top_k = int(model.config.get_text_config().num_experts_per_tok)
            balance = torch.stack(
                [load_balance(each, top_k, real.flatten()) for each in router_logits]
            ).mean()
            loss = loss + recipe.balance * balance / len(batches)
            balances += float(balance.detach()) / len(batches)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(plain) / predicted
        tokens += int(real.sum())
    if not math.isfinite(total):
        raise FloatingPointError(f"the training loss is {total} at step {step + 1}")
    return total, balances, tokens, predicted


def hidden_states(
    model: PreTrainedModel,
    batch: Batch,
    *,
    decoder: Callable[..., Any] | None = None,
    router_logits: bool = False,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return hidden states [rows, length, hidden] of a batch, and router logits [tokens, experts] by MoE layer.

    Args:
        model: A decoder with its language-modelling head.
        batch: See `data.packing.Packed`.
        decoder: The decoder of `model`, when it was compiled.
        router_logits: Whether to return them; an empty tuple otherwise.
    """
    decoder = model.get_decoder() if decoder is None else decoder
    allowed = torch.from_numpy(batch.attends()).to(model.device).unsqueeze(1)
    mask = torch.zeros(allowed.shape, dtype=model.dtype, device=model.device)
    mask.masked_fill_(~allowed, torch.finfo(model.dtype).min)
    out = decoder(
        input_ids=torch.from_numpy(batch.input_ids).to(model.device),
        attention_mask=mask,
        position_ids=torch.from_numpy(batch.positions).to(model.device),
        use_cache=False,
        **({"output_router_logits": True} if router_logits else {}),
    )
    return out.last_hidden_state, out.router_logits if router_logits else ()


def load_balance(router_logits: torch.Tensor, top_k: int, real: torch.Tensor) -> torch.Tensor:
    """Return the load-balancing loss of one layer: 1 when every expert carries the same, more otherwise.

    Switch Transformer's (arXiv 2101.03961, eq. 4) for top-k routing. transformers' own loss pools the layers, so
    that one layer can collapse as long as another makes up for it.

    Args:
        router_logits: [tokens, experts].
        top_k: Experts of a token.
        real: [tokens]; False for padding, which does not count.
    """
    probabilities = router_logits[real].float().softmax(-1)
    experts = probabilities.shape[-1]
    chosen = probabilities.detach().topk(min(top_k, experts), dim=-1).indices
    share = functional.one_hot(chosen, experts).sum(1).float().mean(0) / top_k  # [experts]
    return experts * (share * probabilities.mean(0)).sum()


def _optimizers(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    embeddings |= {id(p) for p in model.get_output_embeddings().parameters()}
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            routers = any(part in name for part in (".gate.", ".router."))
            is_matrix = parameter.ndim >= 2 and id(parameter) not in embeddings and not routers
            (matrices if is_matrix else rest).append(parameter)
    adamw = {"lr": recipe.learning_rate, "betas": (0.9, 0.98), "eps": 1e-9, "fused": True}
    if recipe.optimizer == "muon":
        return [
            Muon(matrices, lr=recipe.learning_rate, weight_decay=recipe.weight_decay),
            torch.optim.AdamW(rest, weight_decay=0.0, **adamw),  # type: ignore[arg-type]
        ]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [torch.optim.AdamW([group for group in groups if group["params"]], **adamw)]  # type: ignore[arg-type]


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(f"{folder.name}.{ending}")


def _newest(folder: Path) -> Path | None:
    """The folder of the state: the old one, if a run was killed between the two renames of `_store`."""
    return next((each for each in (folder, _beside(folder, "old")) if (each / "log.json").exists()), None)


def _store(
    folder: Path,
    model: PreTrainedModel,
    optimizers: list[torch.optim.Optimizer],
    recipe: Recipe,
    log: Log,
) -> None:
    """Write the state beside the old one, then take its place: a run that is killed leaves one of the two."""
    temporary, old = _beside(folder, "partial"), _beside(folder, "old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{key}": value for key, value in state.items()}
    save_file(tensors, temporary / "state.safetensors")
    (temporary / "log.json").write_text(json.dumps({"recipe": asdict(recipe), "log": asdict(log)}))
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _restore(
    folder: Path, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer], recipe: Recipe
) -> Log:
    stored = json.loads((folder / "log.json").read_text())
    schedule = ("steps", "decay")  # may change between runs: a longer run goes on where a shorter one ended
    differing = [
        name
        for name, value in asdict(recipe).items()
        if stored["recipe"].get(name) != value and name not in schedule
    ]
    if differing:
        raise ValueError(
            f"{folder} was made by another recipe: {', '.join(differing)} differ; use another folder"
        )
    done = len(stored["log"]["loss"])
    if done > recipe.steps:
        raise ValueError(f"{folder} holds {done} steps, more than steps = {recipe.steps}; use another folder")
    tensors = load_file(folder / "state.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, index, key = name.split(".", 3)
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return Log(**stored["log"])
