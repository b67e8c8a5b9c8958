"""The steps about decoders: the token that each depth would write, and self-speculative decoding."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pandas as pd

from overparam import models
from overparam.experiment.costs import speed_up
from overparam.experiment.study import step
from overparam.record import stats
from overparam.studies.adaptive_depth.study import RESAMPLES, Study
from overparam.support import progress

_TEXT = 40  # tokens of a text whose exits are read
_SOURCE = 24  # characters of a text that is translated in the test of speculation
_SPECULATION = ["prompts", "equal", "ended", "new_tokens", "rounds", "plain_rounds", "acceptance", "share_of_head",
                "ceiling", "ceiling_at_acceptance", "speed", "speed_low", "speed_high", "plain_seconds",
                "early_seconds"]  # fmt: skip


@step
def tokens(study: Study) -> pd.DataFrame:
    """Read the next token from every depth of the decoders, by final norm and output head, without any training.

    Returns:
        A row a decoder and depth: share of tokens that are the last depth's (`agrees`, in percent, with its interval),
        and layers that a perfect choice of the exit would save (`oracle_saved`, in percent, once a decoder).
    """
    from overparam.compress import exits

    params, rows = study.params, []
    for name in (params.decoder, params.translator):
        if name is None:
            continue
        model, tokenizer = models.load(name, causal=True)
        model = model.float().eval()
        found, total = [], 0
        for before, text in progress.track(_texts(study, name), f"reading every depth of {name}"):
            given = len(tokenizer(before).input_ids) - 1 if before else 0
            ids = tokenizer(before + text).input_ids[: given + _TEXT]
            read = exits.next_tokens(model, ids)[given:].numpy()
            found.append(read)
            total += len(read)
            if total >= params.decoder_tokens:
                break
        predicted = np.concatenate(found)  # [tokens, layers]
        same = (predicted == predicted[:, -1:]).astype(float)
        layers = same.shape[1]
        first = exits.oracle(1 - same)
        saves = stats.bootstrap(100 * (1 - (first + 1.0) / layers), n_resamples=RESAMPLES)
        study.recorder.keep(
            first[:, None].astype(np.float64) + 1, decoder=name, task="first depth with the last token"
        )
        for k in range(layers):
            agrees = stats.bootstrap(same[:, k], n_resamples=RESAMPLES).scaled(100)
            oracle = saves.columns("oracle_saved") if k == layers - 1 else {}
            shape = {"decoder": name, "depth": k + 1, "layers": layers, "tokens": len(same)}
            rows.append(shape | agrees.columns("agrees") | oracle)
    table = pd.DataFrame(
        rows, columns=["decoder", "depth", "layers", "tokens", "agrees", "agrees_low", "agrees_high",
                       "oracle_saved", "oracle_saved_low", "oracle_saved_high"],
    )  # fmt: skip
    study.recorder.table("tokens", table)
    return table


def _texts(study: Study, name: str) -> list[tuple[str, str]]:
    """Texts that a decoder is at home in, with what stands before them: a sentence to translate, or nothing."""
    from overparam.data.parallel import verse_pairs
    from overparam.evaluate import prompts

    params = study.params
    pairs = verse_pairs("en", "fr", "test", n=max(8, params.decoder_tokens // 8), seed=params.seed)
    if name != params.translator:
        return [("", pair.source) for pair in pairs]
    asked = prompts.tagged()([pair.source for pair in pairs], "en", "fr")
    return [(prompt, pair.target) for prompt, pair in zip(asked, pairs, strict=True)]


@step
def speculation(study: Study) -> pd.DataFrame:
    """Let the decoder's first layers draft, compare the texts token by token with greedy decoding, and time both.

    Returns:
        One row: share of texts that are `equal` in percent, texts that `ended` by their end token, rounds of the whole
        model, share of accepted drafts, the `ceiling` of the speed from the share of the output head (with all drafts
        accepted, and at the measured acceptance), and the measured `speed` in multiples of greedy decoding, paired by
        text. Without a decoder, no rows.
    """
    import torch

    from overparam.compress import exits
    from overparam.data.parallel import interface_pairs
    from overparam.evaluate import prompts

    params = study.params
    if params.decoder is None:
        return pd.DataFrame(columns=_SPECULATION)
    model, tokenizer = models.load(params.decoder, causal=True, dtype=torch.float32)
    model.eval()
    layers = model.config.get_text_config().num_hidden_layers
    if params.draft_layers >= layers:
        raise ValueError(
            f"draft_layers must be below {layers}, the layers of {params.decoder}, got {params.draft_layers}"
        )
    pairs = [pair for pair in interface_pairs("fr", seed=params.seed) if len(pair.source) <= _SOURCE]
    shots, asked = pairs[:2], pairs[2 : 2 + params.prompts]
    build = prompts.few_shot(shots)
    line_end = tokenizer.encode("\n", add_special_tokens=False)[-1]
    ends = [line_end, tokenizer.eos_token_id or line_end]
    rows = []
    for prompt in progress.track(build([pair.source for pair in asked], "en", "fr"), "speculating"):
        ids = tokenizer(prompt).input_ids
        row: dict[str, Any] = {}
        for way, draft in (("plain", None), ("early", params.draft_layers)):
            started = time.perf_counter()
            found = exits.decode(
                model, ids, new_tokens=params.new_tokens, ends=ends, draft_layers=draft, drafts=params.drafts
            )
            row |= {way: found, f"{way}_seconds": time.perf_counter() - started}
        rows.append(row)
    plain, early = ([row[way] for row in rows] for way in ("plain", "early"))
    seconds = {way: [row[f"{way}_seconds"] for row in rows] for way in ("plain", "early")}
    written = sum(len(each.tokens) for each in plain)
    rounds = sum(each.rounds for each in early)
    accepted = max(written - rounds, 0) / (rounds * params.drafts)
    head = exits.share_of_head(model)
    rate = accepted_chance(accepted * params.drafts, params.drafts)
    equal = [float(a.tokens == b.tokens) for a, b in zip(plain, early, strict=True)]
    limits = [
        exits.ceiling(layers, params.draft_layers, head, drafts=params.drafts, acceptance=each)
        for each in (1.0, rate)
    ]
    row = {
        "prompts": len(rows), "equal": 100 * float(np.mean(equal)),
        "ended": sum(each.tokens[-1] in ends for each in plain), "new_tokens": written, "rounds": rounds,
        "plain_rounds": sum(each.rounds for each in plain), "acceptance": accepted, "share_of_head": head,
        "ceiling": limits[0], "ceiling_at_acceptance": limits[1],
        **speed_up(seconds["plain"], seconds["early"]).columns("speed"),
        **{f"{way}_seconds": float(np.sum(each)) for way, each in seconds.items()},
    }  # fmt: skip
    study.recorder.keep(np.array(equal)[:, None], decoder=params.decoder, task="equal to greedy decoding")
    table = pd.DataFrame([row], columns=_SPECULATION)
    study.recorder.table("speculation", table)
    return table


def accepted_chance(accepted: float, drafts: int) -> float:
    """Return the chance a of each draft with which a round accepts so many: a + a² + … + a^drafts."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if sum(middle**number for number in range(1, drafts + 1)) < accepted:
            low = middle
        else:
            high = middle
    return high
