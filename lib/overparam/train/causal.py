"""Training of a decoder on packed batches, from scratch or for a short recovery, with checkpoints to resume from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from overparam.data.packing import IGNORED, Packed
from overparam.models import proof
from overparam.models.proof import NotExactError
from overparam.train import loop
from overparam.train.recipe import LoopRecipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_proved: set[str] = set()  # signatures


@dataclass(frozen=True, kw_only=True)
class Recipe(LoopRecipe):
    """How a decoder is trained, beside what `LoopRecipe` says. The caller makes the batches from its seed.

    Attributes:
        accumulate: Batches per step.
        decay: Steps of the linear decay to zero at the end; between warm-up and decay, the learning rate is constant.
        optimizer: "muon" for Muon on the matrices of the blocks and AdamW on the rest, or "adamw" for all.
        label_smoothing: Label smoothing of the cross entropy.
        balance: Factor of the load-balancing loss, which is computed per layer; 0 for none. Or a schedule of
            (from step, factor).
    """

    extendable: ClassVar[bool] = True
    learning_rate: float = 2e-3
    accumulate: int = 1
    decay: int = 0
    optimizer: Literal["muon", "adamw"] = "adamw"
    label_smoothing: float = 0.0
    balance: float | tuple[tuple[int, float], ...] = 0.0

    def balance_at(self, step: int) -> float:
        """Return the factor of the load-balancing loss at a step, counted from 0."""
        if not isinstance(self.balance, tuple):
            return self.balance
        return next((factor for start, factor in reversed(self.balance) if start <= step), 0.0)


@dataclass
class Log(loop.Log):
    """What the training of a decoder logs, one value per step; `loss` is without label smoothing.

    Attributes:
        balance: Load-balancing loss; 1 when all experts carry the same load.
        tokens: Tokens seen so far, padding excluded.
        predicted: Predicted tokens so far.
        dropped: Share of the assignments to experts that found their expert full.
    """

    balance: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)
    dropped: list[float] = field(default_factory=list)


def train(
    model: PreTrainedModel,
    batches: Iterable[Packed],
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    every: int = 200,
    at_checkpoint: Callable[[int], None] | None = None,
    compiled: bool = False,
    capacity: float | None = None,
    bf16: bool = False,
    label: str = "training",
) -> Log:
    """Train all parameters of `model` that require a gradient, in place.

    The loss is the cross entropy at positions with a label; only their logits are computed. The attention mask of
    the batch is applied exactly, also in layers with a sliding window. This needs ``attn_implementation`` "eager" or
    "sdpa".

    Args:
        model: A decoder with its language-modelling head.
        batches: At least ``recipe.steps * recipe.accumulate`` batches, the same in every run: a resumed run skips
            those it has already seen.
        recipe: See `Recipe`.
        checkpoint: Folder for the training state; a run that finds a state there resumes from it.
        every: Steps between checkpoints.
        at_checkpoint: Called with the number of steps done after each checkpoint and at the end.
        compiled: Compile the decoder with `torch.compile`; all batches must then have the same shape.
        capacity: Tokens that an expert takes, in multiples of the mean load; the others are dropped. For gpt_oss, which
            is then computed as `batched` says; None: as transformers computes it.
        bf16: Multiply in bfloat16 where there is a capacity; the router stays in float32.
        label: Name shown in the progress display.

    Raises:
        ValueError: Too few batches, or a step with nothing to predict; a model whose attention takes no mask; a
            balance for a model without routers that state how many experts a token uses; a checkpoint of another
            recipe or model, or of more steps.
        NotExactError: If packed rows do not give the model's own logits.
        FloatingPointError: See `loop.run`.
    """
    import torch

    _prove(model)
    optimizers = optimizers_of(model, recipe)
    top_ks = _top_ks(model) if recipe.balance else []
    decoder: Callable[..., Any] = model.get_decoder()
    if compiled:
        decoder = torch.compile(decoder, dynamic=False)
    losses: _Losses = partial(_padded_losses, model, decoder, recipe.label_smoothing)
    if capacity is not None:
        losses = partial(_batched_losses, model, decoder, recipe.label_smoothing, capacity, bf16)
    stream, log = iter(batches), Log()
    return loop.run(
        model,
        optimizers,
        (list(islice(stream, recipe.accumulate)) for _ in range(recipe.steps)),
        partial(_gradients, losses, top_ks, recipe, log),
        recipe,
        log,
        settings={} if capacity is None else {"capacity": capacity},
        checkpoint=checkpoint,
        every=every,
        at_checkpoint=at_checkpoint,
        label=label,
    )


# of a batch, and whether router logits are asked for: summed losses with and without smoothing, router logits, which
# tokens are real, and the share of assignments to experts that was dropped
_Losses = Callable[
    [Packed, bool], tuple["torch.Tensor", float, "tuple[torch.Tensor, ...]", "torch.Tensor", float]
]


def _gradients(
    losses: _Losses,
    top_ks: list[int],
    recipe: Recipe,
    log: Log,
    step: int,
    batches: list[Packed],
) -> float:
    """Accumulate the gradients of one step; log what is not the loss, and return the loss."""
    import torch

    if len(batches) < recipe.accumulate:
        raise ValueError(f"the batches ended at step {step + 1} of {recipe.steps}")
    predicted = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
    if not predicted:
        raise ValueError(f"the batches of step {step + 1} have nothing to predict")
    factor = recipe.balance_at(step)
    total, balances, tokens, dropped = 0.0, 0.0, 0, 0.0
    for batch in batches:
        smooth, plain, router_logits, real, left = losses(batch, factor > 0)
        loss = smooth / predicted
        if factor:
            layers = zip(router_logits, top_ks, strict=True)
            balance = torch.stack([load_balance(scores, top_k, real) for scores, top_k in layers]).mean()
            loss = loss + factor * balance / len(batches)
            balances += float(balance.detach()) / len(batches)
        loss.backward()  # type: ignore[no-untyped-call]
        total += plain / predicted
        tokens += int(real.sum())
        dropped += left / len(batches)
    log.balance.append(balances)
    log.tokens.append(sum(log.tokens[-1:]) + tokens)
    log.predicted.append(sum(log.predicted[-1:]) + predicted)
    log.dropped.append(dropped)
    return total


def _padded_losses(
    model: PreTrainedModel,
    decoder: Callable[..., Any],
    smoothing: float,
    batch: Packed,
    router_logits: bool,
) -> tuple[torch.Tensor, float, tuple[torch.Tensor, ...], torch.Tensor, float]:
    import torch
    from torch.nn import functional

    hidden, routers = hidden_states(model, batch, decoder=decoder, router_logits=router_logits)
    labels = torch.from_numpy(batch.labels).to(model.device).flatten()
    at = (labels != IGNORED).nonzero().squeeze(1)
    logits = _logits(model, hidden.flatten(0, 1)[at])
    smooth = functional.cross_entropy(logits, labels[at], label_smoothing=smoothing, reduction="sum")
    with torch.no_grad():
        plain = functional.cross_entropy(logits, labels[at], reduction="sum")
    return smooth, float(plain), routers, torch.from_numpy(batch.tree > 0).to(model.device).flatten(), 0.0


def _batched_losses(
    model: PreTrainedModel,
    decoder: Callable[..., Any],
    smoothing: float,
    capacity: float,
    bf16: bool,
    batch: Packed,
    router_logits: bool,
) -> tuple[torch.Tensor, float, tuple[torch.Tensor, ...], torch.Tensor, float]:
    import torch

    from overparam.train import batched

    flat = batched.flat(batch)
    with batched.batched(model, capacity) as load, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden, routers = batched.hidden_states(decoder, flat, router_logits=router_logits)
        smooth, plain = batched.losses(hidden, model.get_output_embeddings().weight, flat.labels, smoothing)
    real = torch.ones(len(flat.labels), dtype=torch.bool)
    return smooth, plain.item(), routers, real, float(np.mean(load.dropped))


def hidden_states(
    model: PreTrainedModel,
    batch: Packed,
    *,
    decoder: Callable[..., Any] | None = None,
    router_logits: bool = False,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return hidden states [rows, length, hidden] of a batch, and router logits [tokens, experts] by MoE layer.

    Args:
        model: A decoder with its language-modelling head.
        batch: See `data.packing.Packed`.
        decoder: The compiled decoder of `model`, if there is one.
        router_logits: Whether to return router logits; otherwise an empty tuple.

    Raises:
        ValueError: If the model's attention takes no mask.
    """
    import torch

    decoder = model.get_decoder() if decoder is None else decoder
    out = decoder(
        input_ids=torch.from_numpy(batch.input_ids).to(model.device),
        attention_mask=_masks(model, batch),
        position_ids=torch.from_numpy(batch.positions).to(model.device),
        use_cache=False,
        **({"output_router_logits": True} if router_logits else {}),
    )
    return out.last_hidden_state, out.router_logits if router_logits else ()


def _logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Apply the model's head to hidden states; return logits, float32 [predicted, vocabulary]."""
    import torch

    config = model.config.get_text_config()
    logits: torch.Tensor = model.get_output_embeddings()(hidden).float()
    if (scaling := getattr(config, "logits_scaling", None) or 1.0) != 1:  # Granite's
        logits = logits / scaling
    if (scale := getattr(config, "logit_scale", None) or 1.0) != 1:  # Cohere's
        logits = logits * scale
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma's
        logits = torch.tanh(logits / cap) * cap
    return logits


@proof.timed()
def _prove(model: PreTrainedModel) -> None:
    """Refuse a model that computes logits differently from this module; run once per architecture and process."""
    import torch

    if (name := proof.signature(model)) in _proved:
        return
    batch = proof.probe(model)
    lengths = batch.attention_mask.sum(1).tolist()
    rows = _one_per_row(batch)
    _masks(model, rows)
    with torch.inference_mode(), proof.evaluating(model):
        try:
            actual = _logits(model, hidden_states(model, rows)[0])
        except Exception as error:  # the kind depends on where the decoder fails with such a mask
            raise NotExactError(f"{type(model).__name__} cannot read packed rows: {error}") from error
        expected = torch.zeros_like(actual, dtype=model.dtype)
        for row, length in enumerate(lengths):
            alone = model(input_ids=batch.input_ids[row : row + 1, :length], use_cache=False)
            expected[row, :length] = alone.logits[0]
    if not proof.is_rounding(actual, expected, batch.attention_mask):
        apart = proof.difference(actual, expected, batch.attention_mask)
        raise NotExactError(
            f"{type(model).__name__} cannot be trained here: the logits of packed rows differ from its own by "
            f"{apart:.1g} of their size, so it treats hidden states or masks in an unknown way"
        )
    _proved.add(name)


def _one_per_row(batch: proof.Probe) -> Packed:
    """The texts of a probe as packed rows, with one sequence in each row and nothing to predict."""
    ids, mask = batch.input_ids.cpu().numpy(), batch.attention_mask.cpu().numpy()
    positions = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
    return Packed(ids, positions, mask, np.zeros_like(ids), np.full_like(ids, IGNORED))


def load_balance(router_logits: torch.Tensor, top_k: int, real: torch.Tensor) -> torch.Tensor:
    """Return the load-balancing loss of one layer: 1 when all experts carry the same load, more otherwise.

    The loss of Switch Transformer (arXiv 2101.03961, eq. 4) for top-k routing. transformers' own loss pools the
    layers: one layer can then collapse while another makes up for it, and layers of different widths cannot be
    added. A token's experts are those with the highest logits; groups of experts, and the correction bias by which
    DeepSeek-V3 balances without a loss, are ignored.

    Args:
        router_logits: [tokens, experts].
        top_k: Experts per token in this layer.
        real: [tokens]; False for padding, which is not counted.
    """
    from torch.nn import functional

    probabilities = router_logits[real].float().softmax(-1)
    experts = probabilities.shape[-1]
    chosen = probabilities.detach().topk(min(top_k, experts), dim=-1).indices
    share = functional.one_hot(chosen, experts).sum(1).float().mean(0) / top_k  # [experts]
    return experts * (share * probabilities.mean(0)).sum()


def _masks(model: PreTrainedModel, batch: Packed) -> torch.Tensor | dict[str, torch.Tensor]:
    """The attention mask, as numbers added to the scores [rows, 1, length, length]; by kind of layer if these differ.

    A decoder uses a given mask unchanged in every layer, so a sliding window must be part of it.
    """
    import torch

    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    unknown = kinds - {"full_attention", "sliding_attention"}
    if config._attn_implementation not in ("eager", "sdpa") or unknown:
        raise ValueError(
            "packed rows need full or sliding attention, loaded with attn_implementation 'eager' or 'sdpa'; "
            f"this model has {', '.join(sorted(unknown)) or repr(config._attn_implementation)}"
        )

    def added(allowed: NDArray[np.bool_]) -> torch.Tensor:
        seen = torch.from_numpy(allowed).to(model.device).unsqueeze(1)
        mask = torch.zeros(seen.shape, dtype=model.dtype, device=model.device)
        return mask.masked_fill_(~seen, torch.finfo(model.dtype).min)

    allowed = batch.attends()
    window = getattr(config, "sliding_window", None) or 0
    slides = "sliding_attention" in kinds if kinds else window > 0
    if not slides or window > batch.positions.max():
        return added(allowed)
    here = batch.positions
    distance = here[:, :, None] - here[:, None, :]  # [rows, length (query), length (key)]
    near = added(allowed & (distance < window))
    return {"full_attention": added(allowed), "sliding_attention": near} if kinds else near


def _top_ks(model: PreTrainedModel) -> list[int]:
    """Experts per token in each layer: pruning may have lowered the number in some."""
    top_ks = [
        module.top_k
        for name, module in model.named_modules()
        if name.endswith((".gate", ".router")) and isinstance(getattr(module, "top_k", None), int)
    ]
    if not top_ks:
        raise ValueError(
            f"balance needs a mixture of experts whose routers state how many experts a token uses, and "
            f"{type(model).__name__} has no such router; train it with balance 0"
        )
    return top_ks


def optimizers_of(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Build the optimizers of a recipe for the parameters that require a gradient."""
    import torch

    from overparam.train.muon import Muon

    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    embeddings |= {id(p) for p in model.get_output_embeddings().parameters()}
    interleaved = {id(module.gate_up_proj) for module in model.modules()
                   if getattr(module, "is_concatenated", True) is False}  # fmt: skip
    matrices: list[torch.nn.Parameter] = []
    pairs: list[torch.nn.Parameter] = []  # of matrices whose columns take turns
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            other = name.endswith("bias") or any(part in name for part in (".gate.", ".router."))
            is_matrix = parameter.ndim >= 2 and id(parameter) not in embeddings and not other
            kind = pairs if id(parameter) in interleaved else matrices if is_matrix else rest
            kind.append(parameter)
    adamw = partial(torch.optim.AdamW, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0, fused=True)
    decay: dict[str, Any] = {"weight_decay": recipe.weight_decay}
    if recipe.optimizer == "muon":
        groups: list[dict[str, Any]] = [
            {"params": matrices, **decay},
            {"params": pairs, **decay, "interleaved": True},
        ]
        muon = Muon([group for group in groups if group["params"]], lr=recipe.learning_rate)
        return [muon, adamw([{"params": rest}])]
    return [adamw([{"params": matrices + pairs, **decay}, {"params": rest}])]
