"""Supervised contrastive training of a (truncated) encoder with LoRA, by sentence-transformers and peft."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overparam import models
from overparam.data.triplets import Triplet
from overparam.models.reading.recipe import PLAIN, TextRecipe
from overparam.support import cache as steps
from overparam.train.recipe import Recipe as BaseRecipe

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Recipe(BaseRecipe):
    """How an encoder is trained, beside what every recipe says. After the warm-up, the rate falls linearly to zero.

    The defaults are L3Prune's (arXiv 2410.14578 and its configs).

    Attributes:
        batch_size: Triplets per step, all from one source.
        lora_rank: Rank r of the adapters.
        lora_alpha: Scaling α of the adapters.
        lora_dropout: Dropout on the inputs of the adapters.
        scale: Factor on the cosine in the loss (1 / temperature).
        max_length: Maximum tokens per text.
        bf16: Compute in bfloat16.
        all_depths: Train every depth, not only the last, by sentence-transformers' `AdaptiveLayerLoss` (arXiv
            2402.14776): at each step one other depth has the same loss and follows the last one's similarities.
    """

    steps: int = 1000
    learning_rate: float = 2e-4
    warmup: int = 300
    batch_size: int = 64
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    scale: float = 50.0
    max_length: int = 512
    bf16: bool = False
    all_depths: bool = False

    def stored(self) -> dict[str, Any]:
        """Return the fields by the names under which adapters are stored and found."""
        fields = asdict(self)
        fields["warmup_steps"] = fields.pop("warmup")
        if not self.all_depths:  # adapters of the last depth are found under the name without it
            del fields["all_depths"]
        return fields


@dataclass(frozen=True)
class TrainedEncoder:
    """A trained encoder.

    Attributes:
        encoder: The encoder with its pooling; adapters are merged into the weights.
        losses: Training loss of every step.
        seconds: Wall time of the training when it ran.
        cached: Whether the adapters came from `cache`.
        adapters: Their folder in `cache`; None without one.
    """

    encoder: SentenceTransformer
    losses: list[float]
    seconds: float
    cached: bool
    adapters: Path | None = None


def lora_targets(model: PreTrainedModel) -> list[str]:
    """Names of all linear projections in the blocks of `model`.

    They are read from the model: Phi-3 fuses query, key and value, and gate and up, so a fixed list of Llama's names
    would silently miss them.
    """
    from torch import nn

    stack = models.blocks(model)
    return [
        f"{stack.path}.{name}"
        for name, module in stack.layers.named_modules()
        if isinstance(module, nn.Linear)
    ]


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    triplets: Sequence[Triplet],
    recipe: Recipe,
    *,
    pooling: str = "weighted_mean",
    instruction: str | None = None,
    text_recipe: TextRecipe = PLAIN,
    cache: Path | None = None,
    identity: str = "",
    label: str = "training",
) -> TrainedEncoder:
    """Train `model` to embed queries near their positives, and away from in-batch and hard negatives.

    Args:
        model: A text encoder or a decoder without its head, truncated or not. It is not changed.
        tokenizer: The model's tokenizer.
        triplets: Training triplets with a ``source``; every batch comes from one source.
        recipe: See `Recipe`.
        pooling: See `depth.layer_embeddings`.
        instruction: Put before queries, instead of the triplets' own instructions.
        text_recipe: What surrounds a text and which tokens are pooled. `depth.PUBLISHED` adds each triplet's
            instructions and the chat template. No module of sentence-transformers pools that way: use such an encoder
            with `depth.layer_embeddings`, and save its model as a transformers folder.
        cache: Folder where adapters are kept; a run with the same model, triplets and recipe reuses them.
        identity: What identifies the weights of `model` in the cache.
        label: Name shown in the progress display.

    Raises:
        ValueError: If a source has fewer triplets than a batch.
        FloatingPointError: If the loss is not finite; the message names the step.
    """
    if text_recipe != PLAIN:
        from overparam.models.reading.pooling import marked

        triplets = [marked(triplet, text_recipe, instruction) for triplet in triplets]
        instruction = None
    sources = _by_source(triplets, recipe.batch_size)
    encoder = as_sentence_transformer(
        model, tokenizer, pooling=pooling, max_length=recipe.max_length, text_recipe=text_recipe
    )
    adapt = partial(_adapt, encoder, sources, recipe, instruction, label)
    cached, stored = False, None
    if cache is None:
        report = adapt()
    else:
        own = [] if text_recipe == PLAIN else [asdict(text_recipe)]
        parts = (identity, len(models.blocks(model).layers), recipe.stored(), pooling, instruction, *own)
        stored = cache / _key(triplets, *parts)
        with steps.using(stored):
            if cached := stored.exists():
                from peft import PeftModel

                report = json.loads((stored / "training.json").read_text())
                encoder[0].model = PeftModel.from_pretrained(encoder[0].model, stored)
            else:
                report = adapt()
                with steps.making(stored) as folder:
                    encoder[0].model.save_pretrained(folder, save_embedding_layers=False)
                    (folder / "training.json").write_text(json.dumps(report))
    encoder[0].model = encoder[0].model.merge_and_unload()
    return TrainedEncoder(encoder.eval(), report["losses"], report["seconds"], cached=cached, adapters=stored)


def _adapt(
    encoder: SentenceTransformer,
    sources: dict[str, list[Triplet]],
    recipe: Recipe,
    instruction: str | None,
    label: str,
) -> dict[str, Any]:
    """Add adapters to the encoder and train them; return the losses, the seconds taken and the recipe."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import AdaptiveLayerLoss, MultipleNegativesRankingLoss
    from transformers import PrinterCallback

    from overparam.train.watcher import Watcher

    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        bias="none",
        target_modules=lora_targets(encoder[0].model),
    )
    encoder[0].model = get_peft_model(encoder[0].model, config)
    started = time.perf_counter()
    names = ("query", "positive", "negative")
    columns = {
        source: Dataset.from_dict({name: [getattr(t, name) for t in members] for name in names})
        for source, members in sources.items()
    }
    loss: Any = MultipleNegativesRankingLoss(encoder, scale=recipe.scale)
    if recipe.all_depths:
        random.seed(recipe.seed)  # it draws the other depth
        loss = AdaptiveLayerLoss(encoder, loss)
    # making widget examples takes seconds, and they are not used
    encoder.model_card_data.set_widget_examples = lambda _: None
    with tempfile.TemporaryDirectory(prefix="overparam-") as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            warmup_steps=recipe.warmup,
            lr_scheduler_type="linear",
            bf16=recipe.bf16,
            seed=recipe.seed,
            data_seed=recipe.seed,
            multi_dataset_batch_sampler="proportional",
            prompts={"query": f"{instruction} "} if instruction else None,
            dataloader_drop_last=True,
            save_strategy="no",
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to=[],
            disable_tqdm=True,
            use_cpu=str(encoder.device) == "cpu",
        )
        trainer = SentenceTransformerTrainer(
            model=encoder,
            args=arguments,
            train_dataset=columns,
            loss=loss,
            callbacks=[Watcher(recipe.steps, label)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "seconds": time.perf_counter() - started, "recipe": recipe.stored()}


def as_sentence_transformer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pooling: str = "weighted_mean",
    max_length: int = 512,
    text_recipe: TextRecipe = PLAIN,
) -> SentenceTransformer:
    """Wrap a copy of `model` as a SentenceTransformer with the pooling of `depth.layer_embeddings`.

    Only with the plain recipe does it consist of modules of sentence-transformers, so that others can load it.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    from overparam.models.folder_recipe import POOLINGS
    from overparam.models.reading.pooling import Reader, TextPooling

    plain = text_recipe == PLAIN
    with tempfile.TemporaryDirectory(prefix="overparam-") as folder, models.quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        kind = Transformer if plain else Reader
        transformer = kind(folder, model_kwargs={"dtype": model.dtype}, max_seq_length=max_length)
    del transformer.model  # reloading may add a pooler, which is not used
    transformer.model = copy.deepcopy(model)
    transformer.tokenizer.padding_side = "right"
    if transformer.tokenizer.pad_token is None:
        transformer.tokenizer.pad_token = transformer.tokenizer.eos_token
    width = model.config.get_text_config().hidden_size
    pool = (Pooling if plain else TextPooling)(width, POOLINGS[pooling], include_prompt=False)
    if not plain:
        transformer.text_recipe = pool.text_recipe = text_recipe
        pool.pooling = pooling
    return SentenceTransformer(modules=[transformer, pool], device=str(model.device))


def _by_source(triplets: Sequence[Triplet], batch_size: int) -> dict[str, list[Triplet]]:
    sources: dict[str, list[Triplet]] = {}
    for triplet in triplets:
        sources.setdefault(triplet.source, []).append(triplet)
    for source, members in sources.items():
        if len(members) < batch_size:
            raise ValueError(
                f"source {source!r} has {len(members)} triplets, a batch of one source needs {batch_size}; "
                "use more triplets or a smaller batch"
            )
    if not sources:
        raise ValueError("there are no training triplets")
    return sources


def _key(triplets: Sequence[Triplet], *parts: object) -> str:
    """Name of adapters in the cache, by the triplets and all else that they depend on."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True).encode())
    for t in triplets:
        digest.update("\x1f".join((t.source, t.query, t.positive, t.negative)).encode())
    return digest.hexdigest()[:24]
