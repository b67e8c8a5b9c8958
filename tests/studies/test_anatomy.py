import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from overparam import models
from overparam.data import parallel
from overparam.data.parallel import Pair
from overparam.studies.anatomy import Params, learning, small, study, tuning, verdicts, watch

TINY = Params(
    model="tiny-qwen3_moe",
    published=("GPT-2", "Llama-2-7B"),
    tuned=True,
    tuning_pairs=4,
    tuning_epochs=2,
    tuning_rates=(3e-2,),
    tuning_items=3,
    tuning_rank=2,
    seeds=(1, 2),
)
ROWS = np.random.default_rng(0).integers(60, 70, size=(4, 32))


def model_of(width=8, **options):
    return small.build(width, window=32, seed=1, **{"symbols": small.BYTES, **options})


@pytest.fixture
def started(monkeypatch):
    words = ["save", "open", "close", "the", "file", "page", "user", "name", "list", "of", "all", "settings"]

    def made(*languages, n, seed, **_):
        draw = np.random.default_rng([seed, len(languages)])
        texts = [" ".join(draw.choice(words, size=5)) for _ in range(2 * n)]
        return [Pair(str(at), texts[at], texts[n + at]) for at in range(n)]

    monkeypatch.setattr(parallel, "interface_pairs", made)
    monkeypatch.setattr(parallel, "verse_pairs", lambda *given, **options: made(*given[:2], **options))
    return study.start(TINY)


def test_two_weights_move_as_the_closed_form_says():
    rate, steps = 0.2, 30
    design = np.stack([watch._INPUTS, np.ones(4)])
    hessian = design @ design.T / 4
    best = np.array([2.0, 1.0])
    end = best - np.linalg.matrix_power(np.eye(2) - rate * hessian, steps) @ best
    assert watch.two_weights(rate, steps)[["a", "b"]].iloc[-1].to_numpy() == pytest.approx(end)


@pytest.mark.parametrize(
    ("rate", "word"), zip(Params().rates, (watch.ARRIVES, watch.OSCILLATES, watch.DIVERGES), strict=True)
)
def test_the_rate_decides_what_two_weights_do(rate, word):
    assert watch.behaviour(watch.two_weights(rate)) == word
    assert (rate > 2 / watch.curvature()) == (word == watch.DIVERGES)


def test_derivatives_agree_with_central_differences():
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    found = watch.derivatives_of(model, ROWS, small.weight_places(model, 8, 0))
    assert found["apart"].max() < 1e-5
    assert found["backward"].abs().max() > 1e-6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_weight_set_to_zero_changes_the_loss_as_a_changed_copy_does():
    model = model_of()
    place = small.weight_places(model, 1, 3)[0]
    (row,) = watch.zeroed(model, ROWS, [place]).to_dict("records")
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        base = small.losses(exact, ROWS).mean()
        exact.get_parameter(place[0]).view(-1)[place[1]] = 0
        after = small.losses(exact, ROWS).mean()
    assert row["change"] == pytest.approx(float(after - base), rel=1e-6)
    assert row["value"] == pytest.approx(float(model.get_parameter(place[0]).detach().view(-1)[place[1]]))


def test_the_most_important_tenth_is_that_of_sizes():
    changes = np.array([-9.0, 1, 1, -1, 1, 1, 1, 1, 1, 1])
    part = watch.most_important(changes)
    assert part.value == 0.5
    assert part.low <= 0.5 <= part.high
    assert watch.most_important(np.ones(50)).value == pytest.approx(0.1)


def test_the_watched_weight_moves_by_its_updates():
    model = model_of()
    name, index = small.weight_places(model, 1, 0)[0]
    path = watch._watched(model, ROWS, name, index, 3, 0)
    assert len(path) == 3
    assert path["value"].iloc[0] + path["update"].sum() == pytest.approx(
        float(model.get_parameter(name).detach().view(-1)[index])
    )


def test_weights_are_drawn_once_each_and_from_all_matrices():
    model = model_of()
    matrices = {name: p.numel() for name, p in model.named_parameters() if ".h." in name and p.ndim == 2}
    places = small.weight_places(model, sum(matrices.values()), 0)
    assert len(set(places)) == len(places)
    assert all(0 <= index < matrices[name] for name, index in places)


def test_an_ignorant_model_stores_nothing_and_a_knowing_one_all_bits():
    assert learning.stored_bits(np.array([math.log(learning.SYMBOLS)])) == pytest.approx(0)
    assert learning.stored_bits(np.array([0.0])) == pytest.approx(6 * learning.STRING)


def test_strings_are_learned_by_heart():
    model = model_of(16, symbols=learning.SYMBOLS)
    strings = np.random.default_rng(1).integers(learning.SYMBOLS, size=(4, learning.STRING))
    before = learning.stored_bits(small.scores(model, strings)).mean()
    small.train(model, small.shuffled(strings, 4, 0), steps=60, rate=1e-2, seed=0, label="test")
    assert learning.stored_bits(small.scores(model, strings)).mean() > before + 30


def test_growth_is_the_slope_of_logarithms():
    sizes = np.array([1e3, 2e3, 4e3])
    found = learning.growth(pd.DataFrame({"parameters": sizes, "stored": 3 * sizes**0.9}))
    assert found.value == pytest.approx(0.9)
    assert found.high - found.low < 1e-6
    two = learning.growth(pd.DataFrame({"parameters": sizes[:2], "stored": sizes[:2]}))
    assert math.isinf(two.high)


def test_early_stopping_takes_the_epoch_with_the_best_other_text():
    other, test = ROWS[:2] + 100, ROWS[2:]
    points, best = learning._overfit(3, 8, 0.0, 1, ROWS, other, test)
    assert [point["epoch"] for point in points] == [1, 2, 3]
    chosen = min(points, key=lambda point: point["chosen"])
    assert best["epoch"] == chosen["epoch"]
    assert best["stopped"].mean() == pytest.approx(chosen[learning.TEST])
    assert best["last"].mean() == pytest.approx(points[-1][learning.TEST])


def test_a_law_is_found_again_from_its_own_values():
    law = np.array([1.2, 30.0, 0.4, 200.0, 0.45])
    sizes, seen = np.repeat([7e3, 1e4, 2e4, 5e4], 3), np.tile([1.25e5, 2.5e5, 5e5], 4)
    found = learning.fit_law(sizes, seen, learning.predict(law, sizes, seen), start=law * 1.05)
    assert learning.predict(found, 1e5, 5e5) == pytest.approx(learning.predict(law, 1e5, 5e5), rel=1e-3)
    with pytest.raises(ValueError, match="needs at least 5 points, got 4"):
        learning.fit_law(sizes[:4], seen[:4], np.ones(4))


def test_the_largest_model_is_held_out_of_the_law(monkeypatch, started):
    monkeypatch.setattr(learning, "_RESAMPLES", 3)
    monkeypatch.setattr(learning, "fit_law", lambda *given, **options: np.array([1.0, 9.0, 0.3, 9.0, 0.3]))
    wanted = {"law_widths": (8, 12, 16, 20), "law_bytes": (1024, 2048, 3072), "law_rates": (1e-3, 3e-3)}
    started.params = TINY.model_copy(update=wanted)
    found = learning.scaling_law(started)
    assert found["points"].groupby("width")["bytes"].apply(list).tolist() == [[1024.0, 2048.0, 3072.0]] * 4
    assert set(found["held_out"]["parameters"]) == {found["points"]["parameters"].max()}
    assert found["fit"]["constant"].tolist() == ["E", "A", "a", "B", "b"]


def test_text_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"test has .* bytes of verses, asked for 100,000,000"):
        small.rows_of_text("test", 100_000_000)


@pytest.mark.parametrize("experts", [False, True])
def test_adapters_are_as_many_as_the_formula_says(experts):
    twin = models.tiny_twin("qwen3_moe", num_hidden_layers=2, causal=True)
    tuned = tuning.adapted(twin, 2, 0, experts=experts)
    trained = [each for each in tuned.parameters() if each.requires_grad]
    assert trained
    optimizer = torch.optim.AdamW(trained)
    tuned(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    optimizer.step()
    used = [each for each in trained if each.grad is not None]
    assert tuning.state_bytes(trained, optimizer) == 12 * sum(each.numel() for each in used)


def test_fine_tuning_compares_methods_from_one_start(started):
    table = tuning.tune(started).set_index("method")
    assert list(table.index) == [tuning.BEFORE, tuning.LORA, tuning.EVERYWHERE, tuning.FULL]
    assert table.loc[tuning.FULL, "trained"] == sum(p.numel() for p in started.routed[0].parameters())
    assert table.loc[tuning.LORA, "trained"] < table.loc[tuning.EVERYWHERE, "trained"]
    assert table.loc[tuning.BEFORE, "gained"] == table.loc[tuning.BEFORE, "forgot"] == 0
    assert table.loc[tuning.FULL, "train"] < table.loc[tuning.BEFORE, "train"]
    assert not any(p.grad is not None for p in started.routed[0].parameters())


def test_every_token_uses_its_top_experts(started):
    table = study.routing(started)
    by_token = table.groupby(["layer", "position"])
    assert (by_token.size() == 2).all()
    assert by_token["gate"].sum().to_numpy() == pytest.approx(1, rel=1e-5)
    assert (
        table["position"].nunique()
        == started.routed[1](TINY.sentence, return_tensors="pt").input_ids.shape[1]
    )
    assert (table["active_expert_parameters"] * 4 == table["expert_parameters"]).all()  # 2 of 8


def test_counts_are_of_the_models_that_were_named_and_the_card_follows_from_published_tokens(started):
    counts, card = study.count(started), study.training_card(started)
    assert list(counts["model"]) == list(TINY.published)
    assert (counts["total"] == counts["built"]).all()
    assert counts["flops_apart"].tolist() == [0, 0]
    (row,) = card[card["model"] == "Llama-2-7B"].to_dict("records")
    assert row["updates"] == 500_000
    assert row["operations"] == 6 * row["parameters"] * 2e12
    assert 0.3 < row["utilisation"] < 0.5
    assert row["million dollars_low"] < row["million dollars"] < row["million dollars_high"]


def test_a_model_that_is_not_published_is_refused():
    with pytest.raises(ValueError, match="no published model is called 'GPT-9'"):
        study.start(TINY.model_copy(update={"published": ("GPT-9",)}))


def test_ids_of_claims_are_plain():
    assert verdicts.slug("GPT-3 6.7B") == "gpt-3-6-7b"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"widths": (30,)}, "widths must be multiples of 4"),
        ({"watched_width": 30}, "watched_width must be a multiple of 4"),
        ({"law_widths": (8, 16)}, "at least 4 sizes"),
        ({"price": (0, 1, 2)}, "greater than 0"),
        ({"price": (1, 2)}, "at least 3 items"),
        ({"utilisation": (0.5, 0.9, 1.1)}, "utilisation at most 1"),
        ({"overhead": (0.9, 1.1, 1.2)}, "overhead must be at least 1"),
        ({"seeds": ()}, "at least 1 item"),
        ({"model": "no-such-model"}, "unknown model"),
    ],
)
def test_impossible_parameters_are_refused(given, message):
    with pytest.raises(ValidationError, match=message):
        Params(**given)
