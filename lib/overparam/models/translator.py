"""The small mixture-of-experts translator that this suite trains: tokenizer, architecture and initial weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from overparam.models.seeding import seeded
from overparam.models.tables import principal_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

Architecture = Literal["qwen3_moe", "gpt_oss"]
LANGUAGES = ("en", "fr", "de", "es", "it")
_NO_SINK = -30_000.0  # in bfloat16 too; the exponential of it is 0
PLAIN = "<lm>"  # precedes text that is not to be translated
_SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", *(f"<2{language}>" for language in LANGUAGES), PLAIN)


def tokenizer(texts: Iterable[str], *, vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with a tag for each target language.

    A prompt is the plain string ``source<2fr>``; the tokenizer puts ``<bos>`` before it.

    Args:
        texts: Training texts.
        vocabulary: Number of tokens, special tokens included.
    """
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=list(_SPECIALS[4:]),
        model_max_length=1024,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build(
    *,
    architecture: Architecture,
    sinks: bool = True,
    vocabulary: int,
    hidden: int,
    layers: int,
    experts: int,
    top_k: int,
    expert_width: int,
    heads: int,
    key_value_heads: int,
    seed: int,
) -> PreTrainedModel:
    """Build an untrained mixture-of-experts decoder of this shape, input and output embeddings tied.

    Args:
        architecture: "gpt_oss" has learned attention sinks, biases in router and experts, and a clamped SwiGLU.
        sinks: Whether gpt_oss learns its attention sinks; False: they are so low that nothing attends to them.
        vocabulary: Number of tokens.
        hidden: Width of the hidden states.
        layers: Transformer blocks, all with full attention.
        experts: Experts per layer.
        top_k: Experts that each token uses per layer.
        expert_width: Hidden units per expert.
        heads: Attention heads.
        key_value_heads: Heads of the keys and values.
        seed: Seed of the weights.
    """
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    shared = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": hidden // heads,
        "num_experts_per_tok": top_k,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with seeded(seed):
        # eager attention: the flash kernel's backward pass is slow on CPUs at these lengths
        if architecture == "gpt_oss":
            oss = GptOssConfig(
                intermediate_size=expert_width,
                num_local_experts=experts,
                layer_types=["full_attention"] * layers,
                rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
                **shared,
            )
            model = GptOssForCausalLM._from_config(oss, attn_implementation="eager", dtype=torch.float32)
            if not sinks:
                for layer in model.model.layers:
                    layer.self_attn.sinks.data.fill_(_NO_SINK)
                    layer.self_attn.sinks.requires_grad_(False)
            return model
        qwen = Qwen3MoeConfig(
            intermediate_size=expert_width,
            moe_intermediate_size=expert_width,
            num_experts=experts,
            norm_topk_prob=True,
            **shared,
        )
        return Qwen3MoeForCausalLM._from_config(qwen, attn_implementation="eager", dtype=torch.float32)


def borrow_embeddings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    donor: PreTrainedModel,
    donor_tokenizer: PreTrainedTokenizerBase,
    *,
    scale: float = 0.03,
) -> None:
    """Initialise the embedding table of `model` from the principal components of a larger model's table.

    A token gets the mean of the embeddings of the donor's tokens for the same string. Special tokens, and tokens that
    are parts of a character, keep their random rows.

    Args:
        model: The model; changed in place.
        tokenizer: The model's tokenizer.
        donor: A model with embeddings of at least as many dimensions.
        donor_tokenizer: The donor's tokenizer.
        scale: Standard deviation of the resulting table.
    """
    import torch

    table = donor.get_input_embeddings().weight.detach().float()
    rows, means = [], []
    for row in range(len(_SPECIALS), len(tokenizer)):
        text = tokenizer.decode([row])
        if text.strip() and "�" not in text:
            ids = donor_tokenizer(text, add_special_tokens=False)["input_ids"]
            rows.append(row)
            means.append(table[ids].mean(0))
    with torch.no_grad():
        target = model.get_input_embeddings().weight
        target[rows] = principal_rows(torch.stack(means), target.shape[1], scale=scale)
