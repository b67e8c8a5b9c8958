"""The steps that count: published models, what their training took, adapters, and one token's experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from overparam import models
from overparam.experiment import study as experiment
from overparam.experiment.study import begins, step
from overparam.measure import budget, flops
from overparam.models import anatomy, published
from overparam.record.stats import Estimate
from overparam.studies.anatomy import Params
from overparam.support import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENS = 64  # tokens for which PyTorch counts operations: the closed form holds for any number
LORA = (  # model, matrices, ranks
    ("GPT-3 175B", ("q_proj", "v_proj"), (1, 4, 8)),
    ("Llama-3-8B", ("q_proj", "v_proj"), (8,)),
    ("Llama-3-8B", "all-linear", (8, 16, 64)),
    ("Gemma 3 270M", "all-linear", (8,)),
    ("BERT-base", ("query", "value"), (8,)),
)


@dataclass
class Study(experiment.Study[Params]):
    """A started study.

    Attributes:
        routed: The mixture, and its tokenizer.
    """

    routed: tuple[PreTrainedModel, PreTrainedTokenizerBase]


@begins
def start(params: Params) -> Study:
    """Load the mixture and open the record.

    Raises:
        ValueError: No published model has a name that was given.
    """
    from overparam.data import corpora

    for name in params.published or ():
        published.find(name)
    inputs = corpora.provenance("verses") | models.provenance(params.model) | params.key_inputs()
    if params.tuned:
        inputs |= corpora.provenance("interface")
    routed = models.load(params.model, causal=True)
    return Study(params, experiment.open_record(params, inputs=inputs, seeds=sorted(params.seeds)), routed)


def _counted(study: Study) -> list[published.Published]:
    """The published models that this run counts."""
    names = study.params.published
    return [each for each in published.models() if names is None or each.name in names]


@step
def count(study: Study) -> pd.DataFrame:
    """Count every published model on the meta device, and let PyTorch count its operations.

    Returns:
        A row a model: `published`, `total`, `built` (the sum over the built model's parameters), `difference` in
        percent and `unexplained` after the explanation; parameters by component; `active` by definition, and the
        published figure; operations a token by the closed form, and their relative distance `flops_apart` from
        PyTorch's count; bytes of the weights by precision.
    """
    rows = []
    for each in progress.track(_counted(study), "counting parameters"):
        built = anatomy.on_meta(each.config())
        found = anatomy.count(built, name=each.name)
        row: dict[str, Any] = {
            "model": each.name, "year": each.year, "published": each.total, "total": found.total,
            "built": sum(parameter.numel() for parameter in built.parameters()),
            "difference": each.difference(found), "unexplained": each.unexplained(found),
            "explanation": each.explanation, "source": each.source,
        }  # fmt: skip
        row |= {part: found.parts.get(part, 0) for part in anatomy.COMPONENTS}
        row |= {f"active {name}": size for name, size in found.active.items()}
        row |= {"active published": each.active, "definition": each.definition if each.active else ""}
        apart = each.active_difference(found) if each.active else {}
        row["active difference"] = apart.get(each.definition, np.nan)
        row["tied"] = found.tied
        try:
            row["flops"] = found.flops_per_token(study.params.length)
            form = found.flops_per_token(_TOKENS)
            # BERT's pooler is for one token of a text
            pooled = 2 * found.parts.get(anatomy.OTHER, 0) / _TOKENS
            row["flops_apart"] = (flops.counted(built, _TOKENS, experts="batched_mm") - pooled) / form - 1
        except ValueError:  # of an encoder-decoder they are not counted
            row |= {"flops": np.nan, "flops_apart": np.nan}
        row |= {f"GB {name}": found.total * bits / 8e9 for name, bits in anatomy.PRECISIONS.items()}
        rows.append(row)
    table = pd.DataFrame(rows)
    table["flops_apart"] = table["flops_apart"].round(5)  # BERT's pooler has biases, which are no products
    study.recorder.table("counts", table)
    return table


@step
def memory(study: Study) -> pd.DataFrame:
    """Return the memory of training by recipe, in GB without activations, for three models.

    Adapters are of rank 16 on all matrices.
    """
    rows = []
    for name in ("Gemma 3 270M", "Llama-3-8B", "Llama-3-70B"):
        config = published.find(name).config()
        total = anatomy.count(config).total
        adapters = anatomy.lora(config, 16)
        for recipe in anatomy.RECIPES:
            trained = adapters if recipe.endswith("LoRA") else None
            size = anatomy.training_bytes(total, recipe, trained) / 1e9
            rows.append({"model": name, "recipe": recipe, "GB": size, "trained": trained or total})
    table = pd.DataFrame(rows)
    study.recorder.table("training_memory", table)
    return table


@step
def training_card(study: Study) -> pd.DataFrame:
    """Return what the trainings took whose tokens were published, from counts and stated assumptions.

    Device hours are published ones where there are any, else those of H100s at the assumed utilisation.

    Returns:
        A row a model: operations, updates of a parameter, device hours (and the `utilisation` that published hours
        imply), millions of dollars, MWh, tonnes of CO2e and cars, each with the ends of its assumptions.
    """
    params, rows = study.params, []
    for each in published.models():
        if not each.tokens:
            continue
        found = anatomy.count(each.config(), name=each.name)
        used = found.active[anatomy.NO_INPUT]
        total = budget.operations(used, each.tokens)
        device = budget.DEVICES[each.device or "H100"]
        if each.device_hours:
            hours = [each.device_hours] * 3
            utilisation = budget.implied_utilisation(total, device, each.device_hours)
        else:
            hours = [budget.device_hours(total, device, share) for share in reversed(params.utilisation)]
            utilisation = params.utilisation[1]
        low, middle, high = hours
        dollars = _range(
            budget.cost(time, price) / 1e6
            for time, price in zip((low, middle, high), params.price, strict=True)
        )
        energy = [
            budget.energy(time, device, more)
            for time, more in zip((low, middle, high), params.overhead, strict=True)
        ]
        carbon = _range(each * grid / 1000 for each, grid in zip(energy, params.grid, strict=True))
        row: dict[str, Any] = {
            "model": each.name, "tokens": each.tokens, "parameters": used, "operations": total,
            "tokens a parameter": each.tokens / used,
            "updates": budget.updates(each.tokens, each.batch) if each.batch else np.nan,
            "device": each.device or "H100", "hours published": bool(each.device_hours), "utilisation": utilisation,
            "device days": middle / 24,
        }  # fmt: skip
        row |= dollars.columns("million dollars")
        row |= _range(each / 1000 for each in energy).columns("MWh")
        row |= carbon.columns("tonnes CO2e") | carbon.scaled(1000 / budget.CAR).columns("cars")
        rows.append(row)
    table = pd.DataFrame(rows)
    study.recorder.table("training_card", table)
    return table


def _range(values: Iterable[float]) -> Estimate:
    """A middle value with the ends of its assumptions."""
    low, middle, high = values
    return Estimate(middle, low, high, 1)


@step
def adapters(study: Study) -> pd.DataFrame:
    """Count LoRA's parameters by the formula r · (inputs + outputs), and as peft builds them on the meta device.

    The layout of GPT-2 has one matrix for queries, keys and values. GPT-3's adapters are therefore counted on OPT's, of
    the same shape.
    """
    rows = []
    for name, targets, ranks in LORA:
        config = published.find(name).config()
        total = anatomy.count(config).total
        if config.model_type == "gpt2":
            config = _as_opt(config)
        matrices, built = targets if isinstance(targets, str) else ", ".join(targets), anatomy.on_meta(config)
        for rank in ranks:
            formula = anatomy.lora(built, rank, targets)
            rows.append({"model": name, "matrices": matrices, "rank": rank, "formula": formula,
                         "peft": _peft(config, rank, targets), "share": 100 * formula / total})  # fmt: skip
    table = pd.DataFrame(rows)
    study.recorder.table("adapters", table)
    return table


def _as_opt(config: Any) -> Any:
    from transformers import OPTConfig

    return OPTConfig(
        num_hidden_layers=config.n_layer, hidden_size=config.n_embd, word_embed_proj_dim=config.n_embd,
        ffn_dim=4 * config.n_embd, num_attention_heads=config.n_head, vocab_size=config.vocab_size,
        max_position_embeddings=config.n_positions,
    )  # fmt: skip


def _peft(config: Any, rank: int, targets: str | tuple[str, ...]) -> int:
    """The parameters of adapters that peft adds to a model without weights."""
    import torch
    from peft import LoraConfig, get_peft_model

    chosen = targets if isinstance(targets, str) else list(targets)
    with torch.device("meta"):
        adapted = get_peft_model(anatomy.on_meta(config), LoraConfig(r=rank, target_modules=chosen))
    return sum(int(each.numel()) for each in adapted.parameters() if each.requires_grad)


@step
def routing(study: Study) -> pd.DataFrame:
    """Read which experts every token of a sentence uses in every layer, and how much of the model that is.

    Returns:
        A row a layer, token and chosen expert, with its gate, normalised over the chosen ones.
    """
    import torch

    from overparam.compress import experts
    from overparam.compress.experts.watching import Routing, watched

    model, tokenizer = study.routed
    ids = tokenizer(study.params.sentence, return_tensors="pt")["input_ids"]
    words = [tokenizer.decode([int(each)]).strip() or "␣" for each in ids[0]]
    rows: list[dict[str, Any]] = []
    for number, layer in enumerate(experts.layers(model)):

        def keep(found: Routing, number: int = number, n_experts: int = layer.n_experts) -> None:
            gates = found.gates / found.gates.sum(dim=1, keepdim=True)
            for token, (chosen, shares) in enumerate(
                zip(found.indices.tolist(), gates.tolist(), strict=True)
            ):
                rows.extend(
                    {"layer": number, "position": token, "token": words[token], "experts": n_experts,
                     "expert": expert, "gate": share}
                    for expert, share in zip(chosen, shares, strict=True)
                )  # fmt: skip

        with watched(layer, keep), torch.inference_mode():
            model(input_ids=ids, use_cache=False)
    table = pd.DataFrame(rows)
    found = anatomy.count(model, name=study.params.model)
    for name, size in {"total": found.total, **found.active}.items():
        study.recorder.metric(f"routed model: {name}", float(size), "parameters")
    table["total"], table["active"] = found.total, found.active[anatomy.BOTH]
    table["expert_parameters"] = found.parts[anatomy.EXPERTS]
    table["active_expert_parameters"] = found.active_experts
    study.recorder.table("routing", table)
    return table
