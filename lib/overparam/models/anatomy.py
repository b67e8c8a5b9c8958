"""What a model's parameters are: counted exactly from a configuration, on the meta device, without any weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overparam.measure import flops

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

TABLE, HEAD, EXPERTS, OTHER = "input table", "head", "experts", "other"
ATTENTION, FEED_FORWARD = "attention", "feed-forward"
COMPONENTS = (TABLE, "positions", ATTENTION, FEED_FORWARD, EXPERTS, "router", "norms", HEAD, OTHER)
BOTH, NO_INPUT, NONE = "both tables", "without the input table", "without tables"
DEFINITIONS = (BOTH, NO_INPUT, NONE)
PRECISIONS = {
    "float32": 32.0,
    "bfloat16": 16.0,
    "int8": 8.0,
    "4 bits": 4.5,
}  # 4 bits and a scale for 32 weights
_PARTS = (  # component, names of modules (whole), parts of names of modules
    (OTHER, ("pooler",), ()),
    (HEAD, ("cls", "lm_head", "classifier", "score"), ()),
    ("norms", ("ln_1", "ln_2", "ln_f"), ("norm",)),
    ("router", ("gate", "router", "shared_expert_gate"), ()),
    (ATTENTION, (), ("attention", "attn")),
    (FEED_FORWARD, ("mlp", "intermediate", "output", "ffn", "fc1", "fc2"), ("feed_forward", "dense")),
)  # fmt: skip


@dataclass(frozen=True)
class TrainingRecipe:
    """Bytes of weights, gradients and optimizer states; activations come on top.

    Attributes:
        frozen: Bytes for each parameter that is not trained.
        trained: Bytes for each one that is.
    """

    frozen: float
    trained: float


# arXiv 1910.02054, section 3.1, counts Adam in mixed precision: 2 (weights) + 2 (gradients) + 4 + 4 + 4
RECIPES = {
    "SGD": TrainingRecipe(4, 8),
    "momentum or Muon": TrainingRecipe(4, 12),
    "AdamW": TrainingRecipe(4, 16),
    "AdamW, mixed precision": TrainingRecipe(2, 16),
    "8-bit AdamW": TrainingRecipe(2, 10),
    "8-bit AdamW, no float32 copy": TrainingRecipe(2, 6),
    "LoRA": TrainingRecipe(2, 16),
    "QLoRA": TrainingRecipe(0.52, 16),  # 4 bits, and scales that are quantized themselves
}


@dataclass(frozen=True)
class Anatomy:
    """Where the parameters of a model are. Tied tensors are counted once.

    Attributes:
        name: Of the model.
        parts: Parameters by component, of those in `COMPONENTS` that there are.
        active_experts: Parameters of the experts that a token uses.
        table: Size of the input table; a tied one serves as the head, too.
        tied: Whether head and input table are the same parameters.
        matrices: Weights that a token's states are multiplied by: a tied head is one of them, looked-up tables,
            experts that are not used, norms and biases are not.
        layers: Layers with weights of their own.
        config: The configuration.
        notes: What a reader of the numbers has to know.
    """

    name: str
    parts: Mapping[str, int]
    active_experts: int
    table: int
    tied: bool
    matrices: int
    layers: int
    config: PreTrainedConfig
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parts.values())

    @property
    def active(self) -> dict[str, int]:
        """Parameters that a token uses, as publishers count them: with both tables, without the input's, without any.

        A tied table is a head, so that the second definition keeps it.
        """
        used = self.total - self.parts.get(EXPERTS, 0) + self.active_experts
        looked_up = 0 if self.tied else self.table
        head = self.table if self.tied else self.parts.get(HEAD, 0)
        return {BOTH: used, NO_INPUT: used - looked_up, NONE: used - looked_up - head}

    def flops_per_token(self, length: int, *, training: bool = False) -> float:
        """Return the operations a token: two for each weight that multiplies it, and attention's scores.

        Args:
            length: Tokens of the sequence.
            training: Count the backward pass, too, which is twice the forward pass.

        Raises:
            ValueError: The architecture's operations cannot be counted; the message says why.
        """
        if self.config.is_encoder_decoder:
            raise ValueError(
                f"{self.name} has an encoder and a decoder, and a token passes only one of them: operations a token "
                "depend on the lengths of both texts"
            )
        if self.layers != getattr(self.config.get_text_config(), "num_hidden_layers", None):
            raise ValueError(
                f"{self.name} uses some of its weights several times for a token, or none of its layers were found: "
                "operations do not follow from the number of parameters"
            )
        forward = 2 * self.matrices + flops.attention_scores(self.config, length)
        return forward * (flops.TRAINING if training else 1)

    def card(self, *, length: int = 1024) -> str:
        """Return the counts as a text for people.

        Args:
            length: Tokens of the sequence for which operations are counted.
        """
        share = {part: f"{size:>19,}  {size / self.total:6.1%}" for part, size in self.parts.items()}
        tied = ["  head                 the input table, tied"] if self.tied else []
        lines = [f"{self.name}: {self.total:,} parameters"]
        lines += [f"  {part:<13}{text}" for part, text in share.items()] + tied
        if self.active_experts:
            lines += [f"active, {name:<24}{size:>19,}" for name, size in self.active.items()]
        sizes = ", ".join(f"{name} {self.total * bits / 8e9:,.3g}" for name, bits in PRECISIONS.items())
        lines.append(f"weights in GB: {sizes}")
        needs = (f"{name} {training_bytes(self.total, name) / 1e9:,.3g}" for name in list(RECIPES)[:5])
        lines.append(f"training in GB, without activations: {', '.join(needs)}")
        try:
            lines.append(
                f"operations a token, {length} tokens: {self.flops_per_token(length):,.4g}, "
                f"in training {self.flops_per_token(length, training=True):,.4g}"
            )
        except ValueError as error:
            lines.append(f"operations are not counted: {error}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def __str__(self) -> str:
        return self.card()


def count(model: str | Path | PreTrainedConfig | PreTrainedModel, *, name: str | None = None) -> Anatomy:
    """Count the parameters of a model by component. A configuration is enough: no weights are read.

    Args:
        model: A bundled name, a hub id, a folder, a config.json, a configuration, or a model that is loaded.
        name: Of the model in what is shown; by default, what was given, or the architecture.

    Returns:
        The counts; `print` shows them as a card. Parameters in modules that are not recognised are counted as "other",
        and a note names the modules.

    Raises:
        ValueError: A configuration that is not of a model in transformers, or lacks a field that the model needs.
    """
    from transformers import PreTrainedConfig, PreTrainedModel

    from overparam.models.counts import count_parameters

    notes = []
    if isinstance(model, PreTrainedModel):
        built, config = model, model.config
        if getattr(model, "hf_quantizer", None) is not None:
            built = on_meta(config)
            notes.append("quantized weights are packed: counted are those of the architecture")
    else:
        config = model if isinstance(model, PreTrainedConfig) else _config(model)
        built = on_meta(config)
    stored = getattr(config, "quantization_config", None)
    if stored and not notes:
        method = stored.get("quant_method") if isinstance(stored, dict) else type(stored).__name__
        notes.append(
            f"stored quantized ({method}), with packed elements: counted are the weights they stand for"
        )
    shown = name or (str(model) if isinstance(model, str | Path) else f"{config.model_type} (configuration)")
    parts: dict[str, int] = {}
    unknown: dict[str, int] = {}
    matrices = expert_matrices = 0
    head = built.get_output_embeddings()
    table: Any = getattr(built.get_input_embeddings(), "weight", None)
    for path, parameter, owner in _parameters(built):
        part = TABLE if parameter is table else HEAD if _of(head, parameter) else _part(path, owner)
        parts[part] = parts.get(part, 0) + parameter.numel()
        if part == OTHER:
            module = ".".join(each for each in path.split(".")[:-1] if not each.isdigit())
            unknown[module] = unknown.get(module, 0) + parameter.numel()
        if _is_matrix(part, parameter, owner) and "pooler" not in path:  # of one token of a text
            if part == EXPERTS:
                expert_matrices += parameter.numel()
            else:
                matrices += parameter.numel()
    tied = head is not None and table is not None and getattr(head, "weight", None) is table
    counts = count_parameters(built)
    active = counts.active - counts.block
    if counts.expert:
        matrices += round(expert_matrices * active / counts.expert)
    if tied:
        notes.append("head and input table are the same parameters: counted once, multiplied by once")
    if unknown:
        notes.append("other: " + ", ".join(f"{module} {size:,}" for module, size in unknown.items()))
    return Anatomy(
        name=shown,
        parts={part: parts[part] for part in COMPONENTS if part in parts},
        active_experts=active,
        table=0 if table is None else table.numel(),
        tied=tied,
        matrices=matrices + (table.numel() if tied else 0),
        layers=_layers(built),
        config=config,
        notes=tuple(notes),
    )


def lora(
    model: PreTrainedConfig | PreTrainedModel, rank: int, targets: str | Sequence[str] = "all-linear"
) -> int:
    """Count the parameters of low-rank adapters, r · (inputs + outputs) a matrix (arXiv 2106.09685), as peft does.

    Args:
        model: A configuration, or a model.
        rank: Rank r.
        targets: Last parts of the names of matrices, such as ("q_proj", "v_proj"); "all-linear": all but the head.

    Raises:
        ValueError: A rank below 1, no such matrix, or "all-linear" for a mixture whose experts are fused tensors, of
            which libraries make adapters in different ways.
    """
    from torch import nn
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    wanted = (targets,) if isinstance(targets, str) else tuple(targets)
    built = model if isinstance(model, PreTrainedModel) else on_meta(model)
    head = built.get_output_embeddings()
    found = {
        path: module
        for path, module in built.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    chosen = [
        module
        for path, module in found.items()
        if targets == "all-linear" or path.rpartition(".")[2] in wanted
    ]
    names = sorted({path.rpartition(".")[2] for path in found})
    if targets == "all-linear" and any(
        ".experts." in path and not isinstance(owner, nn.Linear) for path, _, owner in _parameters(built)
    ):
        raise ValueError(
            f"the experts are fused tensors, not matrices: name the targets, of {', '.join(names)}"
        )
    if not chosen:
        raise ValueError(f"no matrix is called {targets!r}; there are {', '.join(names) or 'none'}")
    return sum(rank * sum(module.weight.shape) for module in chosen)


def training_bytes(total: int, recipe: str, trained: int | None = None) -> float:
    """Return the bytes of weights, gradients and optimizer states in training.

    Args:
        total: Parameters of the model.
        recipe: A name in `RECIPES`.
        trained: Parameters that are trained, adapters included; None: all.

    Raises:
        ValueError: Unknown recipe, or adapters without their number of parameters.
    """
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}: use one of {', '.join(RECIPES)}")
    per = RECIPES[recipe]
    if trained is None:
        if recipe.endswith("LoRA"):
            raise ValueError(f"{recipe} trains adapters: say how many parameters they have in trained=")
        return per.trained * total
    return per.frozen * (total if recipe.endswith("LoRA") else total - trained) + per.trained * trained


def _config(name: str | Path) -> PreTrainedConfig:
    """The configuration that a name, a folder or a file says."""
    from transformers import AutoConfig

    from overparam.models import source

    if not Path(name).expanduser().is_file():
        return source.config(str(name))
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            Path(name).expanduser(), trust_remote_code=False
        )
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{name} is not the configuration of a model in transformers: "
            f"it needs a model_type that transformers knows ({str(error).splitlines()[0]})"
        ) from error
    return config


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model without weights."""
    import torch

    from overparam.models.loading import quiet

    plain = copy.deepcopy(config)
    if getattr(plain, "quantization_config", None) is not None:
        del plain.quantization_config
    try:
        with torch.device("meta"), quiet():
            model: PreTrainedModel = _class(plain)._from_config(plain, attn_implementation="eager")
    except (ValueError, AttributeError, TypeError, KeyError, ZeroDivisionError) as error:
        raise ValueError(
            f"no {plain.model_type or type(plain).__name__} model can be built from this configuration, so that its "
            f"parameters cannot be counted: {error}. Give a whole config.json"
        ) from error
    return model


def _class(config: PreTrainedConfig) -> Any:
    """The class of a checkpoint: the one its configuration names, or else the usual one of its kind."""
    import transformers

    from overparam.models.kinds import decodes

    named = getattr(transformers, (config.architectures or [""])[0], None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named
    auto = (
        transformers.AutoModelForSeq2SeqLM
        if config.is_encoder_decoder
        else transformers.AutoModelForCausalLM
        if decodes(config)
        else transformers.AutoModel
    )
    return auto._model_mapping[type(config)]


def _parameters(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Name, parameter and module of every parameter; a shared one comes once."""
    for path, parameter in model.named_parameters():
        yield path, parameter, model.get_submodule(path.rpartition(".")[0])


def _of(head: nn.Module | None, parameter: nn.Parameter) -> bool:
    return head is not None and any(parameter is each for each in head.parameters())


def _part(path: str, owner: nn.Module) -> str:
    """The component of a parameter that is neither in the input table nor in the head, by the names of its modules."""
    from torch import nn

    names = path.split(".")[:-1]
    if "experts" in names:
        return EXPERTS
    if isinstance(owner, nn.Embedding):
        return "positions"
    for part, whole, pieces in _PARTS:
        if any(name in whole or any(piece in name.lower() for piece in pieces) for name in names):
            return part
    return OTHER


def _is_matrix(part: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
    """Whether activations are multiplied by a parameter; fused experts have a dimension more, their biases too."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(owner, nn.Embedding):
        return False
    fused = part == EXPERTS and not isinstance(owner, nn.Linear | Conv1D)
    return parameter.ndim >= (3 if fused else 2)


def _layers(model: PreTrainedModel) -> int:
    from torch import nn

    lists = [
        len(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and "experts" not in path.split(".")
    ]
    return max(lists, default=0)
