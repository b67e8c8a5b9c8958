"""How a sentence-transformers folder turns texts into embeddings: read from its files, and followed in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as Normalizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overparam.assets.catalogue import TINY
from overparam.models import source
from overparam.models.tables import usable_positions
from overparam.support import progress

POOLINGS = {  # our names -> sentence-transformers'
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_length": "mean_sqrt_len_tokens",
    "weighted_mean": "weightedmean",
    "last": "lasttoken",
}
_OURS = {theirs: ours for ours, theirs in POOLINGS.items()}
_OLD_POOLINGS = {  # in the order in which several are concatenated
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_TRANSFORMER_SETTINGS = (  # older models named the file after their architecture
    "sentence_bert_config.json",
    *(
        f"sentence_{kind}_config.json"
        for kind in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    ),
)
# settings of the transformer that do not change embeddings, or that `models.load` handles
_HARMLESS = (
    "attn_implementation",
    "dtype",
    "torch_dtype",
    "add_pooling_layer",
    "padding_side",
    "use_cache",
    "device_map",
)
_ATTRIBUTE = "_sentence_recipe"
_NO_LIMIT = 10**6  # tokenizers without a limit give a far larger number


@dataclass(frozen=True)
class Dense:
    """A linear layer after the pooling.

    Attributes:
        path: Its folder.
        inputs: Input width.
        outputs: Output width.
        bias: Whether it has a bias.
        activation: Name of a class in ``torch.nn``.
        residual: Whether its input is added to its output.
    """

    path: str
    inputs: int
    outputs: int
    bias: bool = True
    activation: str = "Tanh"
    residual: bool = False

    def __str__(self) -> str:
        return f"{self.inputs} to {self.outputs}, {self.activation}{', residual' if self.residual else ''}"


@dataclass(frozen=True)
class Recipe:
    """How a sentence-transformers model makes embeddings.

    Attributes:
        pooling: How the hidden states of a text are pooled; several results are concatenated. "cls" is the first
            token, "last" the last, "weighted_mean" weights token i by i, "mean_sqrt_length" divides the sum by √length.
        include_prompt: Whether the tokens of a prompt are pooled too.
        after: What follows the pooling, in order: `Dense` layers, and "unit length".
        prompts: Prompts by name, to be put before texts.
        prompt: The default prompt, put before every text; empty for none.
        max_length: Maximum tokens per text; None for the tokenizer's own limit.
        lower: Whether texts are lower-cased.
        width: How many leading dimensions of an embedding are kept; None for all.
        refused: Why the recipe cannot be followed, if it has unknown parts; empty otherwise.
        where: Folder or hub id that holds the weights of the dense layers.
    """

    pooling: tuple[str, ...] = ("mean",)
    include_prompt: bool = True
    after: tuple[Dense | str, ...] = ("unit length",)
    prompts: dict[str, str] = field(default_factory=dict)
    prompt: str = ""
    max_length: int | None = None
    lower: bool = False
    width: int | None = None
    refused: str = ""
    where: Path | str = ""

    @property
    def dense(self) -> tuple[Dense, ...]:
        """The dense layers."""
        return tuple(each for each in self.after if isinstance(each, Dense))

    @property
    def unit_length(self) -> bool:
        """Whether embeddings have unit length."""
        return "unit length" in self.after

    def outputs(self, hidden: int) -> int:
        """Width of the embeddings, for hidden states of width `hidden`."""
        full = self.dense[-1].outputs if self.dense else hidden * len(self.pooling)
        return full if self.width is None else min(self.width, full)

    def without_dense(self) -> Recipe:
        """The recipe without its dense layers, which were trained for hidden states of another depth or width."""
        return replace(self, after=tuple(each for each in self.after if not isinstance(each, Dense)))

    def length(self, wished: int) -> int:
        """Maximum tokens per text: `wished`, or the model's own maximum if that is lower."""
        return wished if self.max_length is None else min(wished, self.max_length)

    def describe(self) -> dict[str, str]:
        """The recipe in words, for a record."""
        return {
            "pooling": " and ".join(self.pooling),
            "dense": "; ".join(map(str, self.dense)) or "none",
            "unit length": "yes" if self.unit_length else "no",
            "dimensions": "all" if self.width is None else f"first {self.width}",
            "prompt": f"{self.prompt!r}{'' if self.include_prompt else ', not pooled'}"
            if self.prompt
            else "none",
            "other prompts": ", ".join(
                f"{k}: {v!r}" for k, v in self.prompts.items() if v and v != self.prompt
            )
            or "none",
            "tokens at most": "the tokenizer's" if self.max_length is None else str(self.max_length),
            "lower case": "yes" if self.lower else "as the tokenizer does",
        }

    def __str__(self) -> str:
        return "; ".join(f"{name}: {value}" for name, value in self.describe().items())


class Embedder(nn.Module):
    """Turns hidden states into embeddings as a recipe says; without a recipe, into their mean at unit length.

    Args:
        recipe: The model's recipe.

    Raises:
        ValueError: If the recipe has unknown parts.
        OSError: If weights of a dense layer are missing.
    """

    def __init__(self, recipe: Recipe | None = None) -> None:
        super().__init__()
        self.recipe = recipe or Recipe()
        check(self.recipe)
        self.layers = nn.ModuleList(_DenseLayer(self.recipe, each) for each in self.recipe.dense).eval()

    def forward(
        self, states: torch.Tensor, mask: torch.Tensor, pooled: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return embeddings, float32 [texts, width].

        Args:
            states: Hidden states, padded on the right. [texts, tokens, hidden]
            mask: 1 for tokens, 0 for padding. [texts, tokens]
            pooled: 1 for the tokens to pool; `mask` by default. [texts, tokens]
        """
        chosen = mask if pooled is None else pooled
        vectors = torch.cat([_POOL[each](states.float(), chosen) for each in self.recipe.pooling], dim=-1)
        layers = iter(self.layers)
        for step in self.recipe.after:
            vectors = (
                next(layers)(vectors) if isinstance(step, Dense) else nn.functional.normalize(vectors, dim=-1)
            )
        return vectors[:, : self.recipe.width]

    def prompted(self, texts: Sequence[str]) -> list[str]:
        """Put the default prompt before each text."""
        return [self.recipe.prompt + text for text in texts]

    def skipped(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Return how many leading tokens are not pooled: those of a prompt that the recipe excludes."""
        if self.recipe.include_prompt or not self.recipe.prompt:
            return 0
        ids = tokenizer(self.recipe.prompt)["input_ids"]
        return len(ids) - (ids[-1] in tokenizer.all_special_ids)


def recipe(model: str | PreTrainedModel) -> Recipe | None:
    """Return the recipe of a sentence-transformers model, or None for a model without one.

    It is read from ``modules.json`` and the files named there, in the layout of any version. No code from the folder
    is run.

    Args:
        model: A name as for `load`, or a model returned by `load`.
    """
    if not isinstance(model, str):
        known, layers = getattr(model, _ATTRIBUTE, (None, None))
        if known and known.dense and layers != model.config.get_text_config().num_hidden_layers:
            progress.note(
                "the dense layers of the model's recipe are left out: they were trained for its last layer"
            )
            return cast(Recipe, known.without_dense())
        return cast("Recipe | None", known)
    if model.startswith(TINY):
        return None
    where = source.root(model)
    modules = source.read_json(where, "modules.json")
    return None if modules is None else _read(where, sorted(modules, key=lambda each: each["idx"]))


def check(recipe: Recipe) -> None:
    """Raise ValueError if a recipe has unknown parts."""
    if recipe.refused:
        raise ValueError(
            f"{recipe.where} cannot be used as its modules.json says: {recipe.refused}. Remove modules.json "
            "to use it as a plain model, whose last hidden states are averaged."
        )


def follow(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the tokenizer's maximum length and lower-casing from the recipe, and attach the recipe to the model."""
    positions = usable_positions(model)
    own = int(tokenizer.model_max_length)
    limit = recipe.max_length or (own if positions is None else min(own, positions))
    tokenizer.model_max_length = limit
    if recipe.lower and tokenizer.is_fast:
        normalizer = tokenizer.backend_tokenizer.normalizer
        steps: list[Any] = [] if normalizer is None else [normalizer]
        if isinstance(normalizer, Normalizers):
            steps = [*iter(cast(Any, normalizer))]
        tokenizer.backend_tokenizer.normalizer = Normalizers([Lowercase(), *steps])
    known = limit if limit < _NO_LIMIT else None
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    setattr(model, _ATTRIBUTE, (replace(recipe, max_length=known), layers))


def dense_weights(recipe: Recipe, dense: Dense) -> dict[str, torch.Tensor]:
    """Read the weights of a dense layer, by name, from safetensors.

    Raises:
        OSError: If the file is missing.
        ValueError: If the weights do not fit the layer's configuration.
    """
    path = source.file(recipe.where, f"{dense.path}/model.safetensors")
    if path is None:
        raise OSError(
            f"{recipe.where} has no {dense.path}/model.safetensors, the weights of its dense layer; "
            "save it again with safe_serialization=True"
        )
    weights: dict[str, torch.Tensor] = load_file(path)
    if weights["linear.weight"].shape != (dense.outputs, dense.inputs):
        raise ValueError(
            f"{path} is {list(weights['linear.weight'].shape)}, its config.json says {[dense.outputs, dense.inputs]}"
        )
    return weights


class _DenseLayer(nn.Module):
    def __init__(self, recipe: Recipe, dense: Dense) -> None:
        super().__init__()
        self.linear = nn.Linear(dense.inputs, dense.outputs, bias=dense.bias)
        self.residual = (
            nn.Linear(dense.inputs, dense.outputs, bias=False)
            if dense.residual and dense.inputs != dense.outputs
            else None
        )
        self.load_state_dict(dense_weights(recipe, dense))
        self.activation, self.adds = getattr(nn, dense.activation)(), dense.residual

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.activation(self.linear(inputs))
        if self.adds:
            outputs = outputs + (inputs if self.residual is None else self.residual(inputs))
        return outputs


def _at(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return states[torch.arange(len(states), device=states.device), places]


def _sum(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (states * weights[..., None]).sum(dim=1)


def _numbered(mask: torch.Tensor) -> torch.Tensor:
    """1, 2, 3, … at the tokens of a mask, by position; 0 elsewhere."""
    return mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)


_POOL: dict[
    str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
] = {  # (states, mask) -> [texts, hidden]
    "cls": lambda states, mask: _at(states, mask.int().argmax(dim=1)),
    "last": lambda states, mask: _at(states, _numbered(mask).argmax(dim=1)),
    "mean": lambda states, mask: _sum(states, mask) / mask.sum(dim=1, keepdim=True),
    "mean_sqrt_length": lambda states, mask: _sum(states, mask) / mask.sum(dim=1, keepdim=True).sqrt(),
    "weighted_mean": lambda states, mask: (
        _sum(states, _numbered(mask)) / _numbered(mask).sum(dim=1, keepdim=True)
    ),
    "max": lambda states, mask: states.masked_fill(mask[..., None] == 0, -torch.inf).amax(dim=1),
}


class _UnknownPartError(Exception):
    """A part of a recipe that this module does not know."""


def _read(where: Path | str, modules: list[dict[str, Any]]) -> Recipe:
    """Read all parts. An unknown part is stored, not raised: it matters only to callers that want embeddings."""
    try:
        names = [_class_of(module) for module in modules]
        if names[:2] != ["Transformer", "Pooling"]:
            raise _UnknownPartError(
                f"its modules are {', '.join(names)}, not a Transformer and a Pooling first"
            )
        transformer = _transformer(where, modules[0].get("path", ""))
        own = source.read_json(where, "config_sentence_transformers.json") or {}
        if own.get("model_type", "SentenceTransformer") != "SentenceTransformer":
            raise _UnknownPartError(f"it is a {own['model_type']}, which gives no dense embedding")
        pooling = source.read_json(where, f"{modules[1]['path']}/config.json") or {}
        prompts = {name: text or "" for name, text in (own.get("prompts") or {}).items()}
        default = own.get("default_prompt_name")
        if default is not None and default not in prompts:
            raise _UnknownPartError(f"its default prompt {default!r} is not among its prompts")
        after = [_step(where, module, name) for module, name in zip(modules[2:], names[2:], strict=True)]
        return Recipe(
            pooling=_poolings(pooling),
            include_prompt=bool(pooling.get("include_prompt", True)),
            after=tuple(step for step in after if step),
            prompts=prompts,
            prompt=prompts[default] if default is not None else "",
            max_length=transformer.get("max_seq_length"),
            lower=bool(transformer.get("do_lower_case", False)),
            width=own.get("truncate_dim"),
            where=where,
        )
    except _UnknownPartError as error:
        return Recipe(refused=str(error), where=where)


def _class_of(module: dict[str, Any]) -> str:
    package, _, name = str(module["type"]).rpartition(".")
    return name if package.split(".")[0] == "sentence_transformers" else str(module["type"])


def _transformer(where: Path | str, path: str) -> dict[str, Any]:
    """Read the settings of the transformer module."""
    prefix = f"{path}/" if path else ""
    settings: dict[str, Any] = {}
    for name in _TRANSFORMER_SETTINGS if isinstance(where, Path) else _TRANSFORMER_SETTINGS[:1]:
        settings = source.read_json(where, prefix + name) or {}
        if settings:
            break
    if settings.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise _UnknownPartError(f"its transformer does {settings['transformer_task']}")
    if settings.get("module_output_name", "token_embeddings") != "token_embeddings":
        raise _UnknownPartError(
            f"its transformer gives {settings['module_output_name']}, not token_embeddings"
        )
    text = (settings.get("modality_config") or {"text": {}}).get("text")
    wanted = {"method": "forward", "method_output_name": "last_hidden_state"}
    if text is None or {**wanted, **text} != wanted:
        raise _UnknownPartError("its transformer does not pool the last hidden states of plain text")
    for group in (
        "model_args",
        "model_kwargs",
        "config_args",
        "config_kwargs",
        "tokenizer_args",
        "processor_kwargs",
    ):
        given = dict(settings.get(group) or {})
        length = given.pop("model_max_length", None)
        if length is not None:
            settings.setdefault("max_seq_length", length)
        if others := sorted(set(given) - set(_HARMLESS)):
            raise _UnknownPartError(f"{group} of its transformer sets {', '.join(others)}")
    if settings.get("processing_kwargs"):
        raise _UnknownPartError("processing_kwargs of its transformer are set")
    return settings


def _poolings(config: dict[str, Any]) -> tuple[str, ...]:
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _OLD_POOLINGS.items() if config.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if unknown := [mode for mode in modes if mode not in _OURS]:
        raise _UnknownPartError(f"its pooling {unknown[0]!r} is unknown")
    return tuple(_OURS[mode] for mode in modes)


def _step(where: Path | str, module: dict[str, Any], name: str) -> Dense | str:
    """Read a module after the pooling; an empty string for one that only acts in training."""
    if name == "Normalize":
        return "unit length"
    if name == "Dropout":
        return ""
    if name != "Dense":
        raise _UnknownPartError(f"its module {name} is unknown")
    config = source.read_json(where, f"{module['path']}/config.json") or {}
    if {config.get(key) or "sentence_embedding" for key in ("module_input_name", "module_output_name")} != {
        "sentence_embedding"
    }:
        raise _UnknownPartError("its dense layer reads or writes something other than sentence embeddings")
    path, _, activation = str(
        config.get("activation_function", "torch.nn.modules.activation.Tanh")
    ).rpartition(".")
    if not path.startswith("torch.nn") or not isinstance(getattr(nn, activation, None), type):
        raise _UnknownPartError(
            f"the activation {config['activation_function']} of its dense layer is not one of torch.nn"
        )
    return Dense(
        path=str(module["path"]),
        inputs=int(config["in_features"]),
        outputs=int(config["out_features"]),
        bias=bool(config.get("bias", True)),
        activation=activation,
        residual=bool(config.get("use_residual", False)),
    )
