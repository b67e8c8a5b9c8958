import math
import sys

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from overparam.compress import experts
from overparam.data import splits
from overparam.data.kinds import KINDS
from overparam.data.parallel import VERSIONS
from overparam.record import ledger, stats
from overparam.studies.moe_expert_pruning import (
    Params,
    comet,
    overlap,
    plots,
    recovery,
    study,
    sweep,
    verdicts,
)
from overparam.studies.moe_expert_pruning import calibration as calibrations

TINY = {
    "model": "tiny-qwen3_moe",
    "languages": ("fr", "de"),
    "calibration_items": 8,
    "test_items": 8,
    "translated_items": 8,
    "plain_characters": 64,
    "max_new_tokens": 4,
    "batch_tokens": 4096,
    "shares": (0.5,),
    "recovery_shares": (0.5,),
    "recovery_items": 8,
    "recovery_steps": 2,
    "recovery_rows": 2,
    "recovery_row_length": 1024,
    "dense_reference": None,
    "dense_items": 2,
    "cost_texts": 2,
    "cost_repeats": 3,
    "cost_new_tokens": 4,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "moe-translater"}, "did you mean 'moe-translator'"),
        ({"languages": ("fr",)}, "at least 2"),
        ({"languages": ("fr", "it")}, "different languages"),
        ({"languages": ("fr", "en")}, "other than English"),
        ({"shares": (0.5, 1.0)}, "less than 1"),
        ({"shares": (0.5, 0.25), "recovery_shares": ()}, "increase"),
        ({"recovery_shares": (0.3,)}, "0.3 is not"),
        ({"random_seeds": 2}, "greater than or equal to 3"),
        ({"translated_items": 80, "test_items": 60}, "at most test_items"),
        ({"prompt": "none"}, "few_shot"),
        ({"layers": 3}, "Extra inputs"),
    ],
)
def test_bad_parameters_are_refused_at_once(change, message):
    with pytest.raises(ValidationError, match=message):
        Params(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "tiny-llama"}, "dense"),
        ({"shares": (0.9,), "recovery_shares": ()}, r"at most 0\.75 .* got 0\.9"),
    ],
)
def test_what_cannot_be_pruned_is_refused_before_any_long_work(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        study.start(Params(**{**TINY, **change}))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OVERPARAM_JOB_DIR", str(tmp_path_factory.mktemp("job")))
        yield study.start(Params(**TINY))


@pytest.fixture(scope="module")
def base(started):
    return study.baseline(started)


@pytest.fixture(scope="module")
def calibration(started):
    return calibrations.calibrate(started)


@pytest.fixture(scope="module")
def rises(started, calibration):
    return calibrations.sensitivity(started, calibration)


@pytest.fixture(scope="module")
def swept(started, base, calibration, rises):
    return sweep.sweep(started, base, calibration, rises)


@pytest.fixture(scope="module")
def transferred(started, base, calibration):
    return sweep.transfer(started, base, calibration)


@pytest.fixture(scope="module")
def agreement(started, calibration):
    return overlap.overlap(started, calibration)


@pytest.fixture(scope="module")
def translated(started, base, calibration, rises):
    return sweep.quality(started, base, calibration, rises)


def test_every_kind_of_text_is_tested(started):
    groups = {name: test.group for name, test in started.tests.items()}
    assert groups["en-fr"] == "seen"
    assert groups["en-it"] == "unseen"
    assert groups["it-en"] == groups["fr-en"] == "reverse"
    assert groups["interface en-de"] == "interface"
    assert {name for name, group in groups.items() if group == "plain"} == set(KINDS)
    assert all(len(test.prompts) == len(test.targets) == 8 for test in started.tests.values())


def test_no_two_parts_share_a_sentence_and_no_parent_was_trained_on_one(started):
    trained = {verse.id for verse in splits.verses_in(VERSIONS["en"], "train")}
    seen = set()
    for part in ("test", "calibration", "training", "examples"):
        ids = {pair.id for pair in started.pairs("en", "fr", part, 8)}
        assert len(ids) == 8
        assert ids == {pair.id for pair in started.pairs("de", "en", part, 8)}
        assert not ids & (seen | trained)
        seen |= ids


def test_statistics_of_parts_add_up_to_those_of_the_whole(started, calibration):
    fr = calibration.of("fr")
    assert fr.sequences == 8
    assert np.allclose(fr.routing_mass.sum(axis=1), 1)
    assert calibration.pooled.sequences == 16
    assert calibration.pooled.tokens == sum(calibration.of(language).tokens for language in ("fr", "de"))
    assert calibration.generated["fr"].tokens < fr.tokens
    assert np.allclose(calibration.mix.sum(axis=1), 1)


@pytest.mark.parametrize(
    "allocation", ["divergence", "divergence, written", "uniform", "inverse", "sensitivity"]
)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_budgets_are_met_exactly(started, calibration, rises, allocation, share):
    keep = calibrations.keep_sets(
        started, calibration.pooled, calibration, share, allocation=allocation, rises=rises
    )
    assert sum(map(len, keep)) == round(len(started.layers) * started.n_experts * (1 - share))
    assert min(map(len, keep)) >= started.top_k
    pruned = started.pruned(keep)
    assert [layer.n_experts for layer in experts.layers(pruned)] == list(map(len, keep))


def test_pruning_a_copy_leaves_the_unpruned_model_as_it_was(started, base, calibration):
    keep = calibrations.keep_sets(started, calibration.pooled, calibration, 0.5)
    started.pruned(keep)
    again = started.losses("again", started.model, ["en-fr"])["en-fr"]
    assert np.array_equal(again, base.losses["en-fr"])
    assert all(layer.n_experts == started.n_experts for layer in experts.layers(started.model))


def test_the_rise_of_one_layer_is_that_of_a_model_with_only_this_layer_cut(started, calibration, rises):
    assert rises.groupby("layer")["kept"].apply(list).tolist() == [[2, 3, 4, 6]] * len(started.layers)
    mass = experts.scores(calibration.pooled, "routing_mass")
    keep = experts.select(mass, [8, 2, 8, 8, 8, 8])
    tests = started.calibration_tests
    before, after = (started.losses_on(tests, model) for model in (started.model, started.pruned(keep)))
    per_token = [
        [items[:, 0].sum() / items[:, 1].sum() for items in each.values()] for each in (before, after)
    ]
    row = rises.query("layer == 1 and kept == 2").iloc[0]
    assert row["loss_change"] == pytest.approx(np.mean(per_token[1]) - np.mean(per_token[0]), abs=1e-6)
    assert row["loss_change_low"] <= row["loss_change"] <= row["loss_change_high"]


def test_the_text_of_the_budgets_can_be_chosen(started, calibration, monkeypatch):
    both = calibrations.keep_sets(started, calibration.pooled, calibration, 0.5)
    alone = calibrations.keep_sets(
        started, calibration.pooled, calibration, 0.5, allocation="divergence, written"
    )
    other = started.params.model_copy(update={"budget_text": "written"})
    assert sweep.WRITTEN in [(each.method, each.allocation) for each in sweep.systems(started, 0.5)]
    monkeypatch.setattr(started, "params", other)
    assert calibrations.keep_sets(started, calibration.pooled, calibration, 0.5) == alone
    assert sweep.WRITTEN not in [(each.method, each.allocation) for each in sweep.systems(started, 0.5)]
    mass = [calibration.target(text).routing_mass for text in ("read and written", "written")]
    assert not np.allclose(*mass)
    assert sum(map(len, both)) == sum(map(len, alone))


def test_below_the_floor_a_token_uses_fewer_experts(started, calibration, swept):
    assert started.lowered == 1 - 1 / 8
    keep = swept.keep["routing_mass", started.lowered]
    assert [len(each) for each in keep] == [1] * len(started.layers)
    assert {layer.top_k for layer in experts.layers(started.pruned(keep))} == {1}
    assert {layer.top_k for layer in experts.layers(started.model)} == {2}


def test_a_random_model_bounds_no_change_of_chrf(started, base):
    assert study.mean_chrf(base.scores, started.params.languages) == 0
    change = study.change_in_chrf(started, base.scores, base.scores)
    assert (change.low, change.high) == (-math.inf, math.inf)


def test_sweep_holds_every_system_at_every_share(started, swept):
    table = swept.table
    assert len(table) == len(started.params.shares) * len(sweep.systems(started, 0.5)) + 1 == 14
    assert set(table["method"]) == set(experts.METHODS) - {"reap_renormalised"}
    assert table["idle_among_pruned"].between(0, 1).all()
    assert (table["low"] <= table["loss_change"]).all()
    expected = {("routing_mass", 0.5), ("routing_mass_super", 0.5), ("routing_mass", 0.875)}
    assert set(swept.losses) == set(swept.keep) == expected


def test_a_super_expert_is_pruned_alone_and_beside_the_most_used_one(started, base, calibration, monkeypatch):
    assert sweep.without_super_experts(started, base, calibration).empty
    monkeypatch.setattr(sweep.experts, "super_experts", lambda _: [[2], [], []])
    table = sweep.without_super_experts(started, base, calibration)
    mass = calibration.pooled.routing_mass[0]
    assert table["expert"].tolist() == [
        2,
        max(set(range(started.n_experts)) - {2}, key=lambda each: mass[each]),
    ]
    assert table["super"].tolist() == [True, False]
    assert table["loss_change"].abs().gt(0).all()
    assert started.recorder.record.metrics["super_experts"].value == 1


def test_idle_experts_are_those_that_hardly_work(started, calibration):
    idle = sweep.idle_experts(started, calibration)
    for layer, mass in zip(idle, calibration.mix, strict=True):
        assert layer == {e for e, value in enumerate(mass) if value < 0.25 / started.n_experts}


def test_overlap_is_one_with_itself_and_beats_chance_for_one_text_twice(started, calibration, agreement):
    found = agreement
    assert np.allclose(np.diag(found.matrix), 1)
    assert np.allclose(found.matrix, found.matrix.T)
    assert 0 < found.chance < 1
    assert found.languages.low <= found.languages.value <= found.languages.high
    sizes = overlap.calibration_size(started, calibration)
    assert list(sizes["sentences"]) == [4]  # of eight, twice four that share none
    assert sizes["overlap"].between(0, 1).all()


def test_translations_of_a_sentence_share_its_tokens(started):
    texts = {"references": {"fr": [("a b<2fr>", "c"), ("d<2fr>", "e")], "de": [("a b<2de>", "f")]}}
    trees = recovery.trees(started, texts["references"])
    prompts = started.tokenizer(["a b<2fr>", "d<2fr>", "a b<2de>"])["input_ids"]
    eos = started.tokenizer.eos_token_id
    sequences = [[*tree.prefix, *branch] for tree in trees for branch in tree.branches]
    expected = [
        [*prompt, *started.tokenizer(target, add_special_tokens=False)["input_ids"], eos]
        for prompt, target in zip(prompts, ("c", "e", "f"), strict=True)
    ]
    assert sorted(sequences) == sorted(expected)


def test_a_tree_that_is_too_long_is_taken_apart_and_a_sequence_that_is_too_long_left_out(started):
    words = "word " * 150
    pairs = {"fr": [(f"{words}<2fr>", "oui")], "de": [(f"{words}<2fr>", "ja"), (words * 2, "nein")]}
    trees = recovery.trees(started, pairs)
    assert all(len(tree) <= started.params.recovery_row_length for tree in trees)
    assert sum(len(tree.branches) for tree in trees) == 2


def test_recovery_trains_a_copy_of_its_own(started, base, swept, translated, tmp_path):
    before = {name: value.clone() for name, value in started.model.state_dict().items()}
    references = recovery.training_texts(started)["references"]
    texts = {"references": references, "parent": references}  # a random parent never ends a translation
    found = recovery.recover(started, base, swept, translated, texts)
    assert set(found.table["trained"]) == {"all parameters", "adapters"}
    assert set(found.change) == {
        recovery.Kind(0.0, "routing_mass", "references"),
        recovery.Kind(0.0, "routing_mass", "parent"),
        recovery.Kind(0.875, "routing_mass", "parent"),
        recovery.Kind(0.5, "routing_mass", "references"),
        recovery.Kind(0.5, "routing_mass", "parent"),
        recovery.Kind(0.5, "routing_mass", "parent", lora=True),
        recovery.Kind(0.5, "routing_mass_super", "parent"),
    }
    assert all(value.equal(before[name]) for name, value in started.model.state_dict().items())
    plots.plot_quality(started, translated, found)
    plots.plot_chrf(started, translated)
    saved = {figure.id for figure in started.recorder.record.figures}
    assert {"fig:experts-quality", "fig:experts-chrf"} <= saved


def test_unended_translations_of_the_parent_are_left_out(started):
    texts = recovery.training_texts(started)
    assert len(texts["references"]["fr"]) == 8
    assert len(texts["parent"]["fr"]) <= 8
    assert all(target for _, target in texts["parent"]["fr"])


def test_a_parent_that_ends_nothing_teaches_nothing(started, base, swept, translated):
    references = recovery.training_texts(started)["references"]
    texts = {"references": references, "parent": {"fr": [], "de": []}}
    found = recovery.recover(started, base, swept, translated, texts)
    assert set(found.table["targets"]) == {"references"}


def test_figures_are_drawn_from_what_they_save(
    started, base, calibration, rises, swept, agreement, transferred
):
    plots.plot_routing(started, overlap.routing_table(started, calibration))
    plots.plot_methods(started, swept)
    plots.plot_sensitivity(started, rises)
    plots.plot_elsewhere(started, sweep.elsewhere(started, base, swept))
    plots.plot_transfer(started, transferred)
    plots.plot_overlap(started, agreement)
    saved = {figure.id: figure for figure in started.recorder.record.figures}
    assert len(saved) >= 6
    csv = pd.read_csv(started.recorder.directory / "figure_methods.csv")
    assert set(csv["method"]) == set(experts.METHODS) - {
        "reap_renormalised"
    }  # equal where gates are normalised


def test_published_numbers_are_in_percent_of_the_unpruned_model():
    published = verdicts.published_quality().set_index(["recovered", "share_pruned"])["change_percent"]
    assert published[False, 0.5] == pytest.approx(ledger.published_value("experts-half"), abs=0.01)
    assert published[False, 0.6875] == pytest.approx(ledger.published_value("experts-70"), abs=0.01)
    assert published[True, 0.75] == pytest.approx(ledger.published_value("experts-75-recovered"), abs=0.01)
    assert published[True, 0.875] == pytest.approx(ledger.published_value("experts-90-recovered"), abs=0.01)


def _costs(bytes_kept):
    return pd.DataFrame(
        {
            "share_pruned": [0.0, 0.75],
            "parameters": [100, 40],
            "folder_bytes": [1000, bytes_kept],
            "resident_bytes": [1100, 440],
            "active_parameters": [30, 30],
        }
    )


def _latencies(pruned_seconds):
    seconds = [1.0, 1.1, 0.9, 1.0, 1.0]
    return pd.DataFrame(
        {
            "share_pruned": [0.0] * 5 + [0.75] * 5,
            "step": "generate_all",
            "seconds": seconds + [pruned_seconds * each for each in seconds],
        }
    )


@pytest.mark.parametrize(
    ("bytes_kept", "verdict"),
    [
        (400, "reproduced"),
        (411, "reproduced"),
        (500, "reproduced in direction"),
        (1000, "not reproduced"),
        (1100, "not reproduced"),
    ],
)
def test_bytes_are_judged_against_the_parameters(bytes_kept, verdict):
    disk, memory = verdicts.size_claims(_costs(bytes_kept))
    assert disk.verdict == verdict
    assert memory.verdict == "reproduced"


@pytest.mark.parametrize(
    ("seconds", "verdict"), [(1.02, "reproduced"), (0.5, "not reproduced"), (2.0, "not reproduced")]
)
def test_time_that_stays_is_what_was_published(seconds, verdict):
    unchanged, faster, active = verdicts.time_claims(_costs(400), _latencies(seconds))
    assert unchanged.verdict == verdict
    assert faster.verdict == ("reproduced" if seconds == 0.5 else "not reproduced")
    assert active.verdict == "not reproduced"  # a token uses as many parameters as before


def test_other_tasks_are_compared_with_translation_each_pruned_for_itself(started, transferred):
    rise = transferred.set_index(["calibration", "test"])["loss_change"]
    assert set(KINDS) <= set(transferred["calibration"])
    claim = verdicts._other_tasks(started, transferred)
    own = np.mean([rise[kind, kind] for kind in ("news", "chat", "documentation", "code")])
    translation = np.mean([rise["all languages", f"en-{language}"] for language in ("fr", "de")])
    assert claim.measured.value == pytest.approx(translation - own)
    assert claim.measured.low < claim.measured.value < claim.measured.high


def test_every_claim_gets_a_verdict(started, base, swept, translated, agreement, transferred):
    recovered = recovery.Recovered(
        pd.DataFrame(), {recovery.Kind(0.75, "routing_mass", "parent"): stats.Estimate(-1.0, -1.8, -0.2, 8)}
    )
    cost = (_costs(400), _latencies(1.0))
    claims = verdicts.verdicts(started, base, swept, translated, recovered, agreement, transferred, cost)
    found = {claim.id: claim for claim in claims}
    assert len(found) == len(claims) == 14
    assert found["experts-75-recovered"].verdict == "reproduced"
    assert found["experts-70"].verdict == "not testable at this scale"
    assert found["experts-half"].verdict == "inconclusive"
    name = sweep.System(0.0, *sweep.PUBLISHED).name
    change = {
        (name, 0.5, "", ""): stats.Estimate(-1.0, -1.5, -0.5, 8),
        (f"recovered, {name}", 0.75, "parent", "all parameters"): stats.Estimate(-9.0, -9.8, -8.2, 8),
    }
    scored = comet.CometScores(pd.DataFrame(), change)
    claims = verdicts.verdicts(
        started, base, swept, translated, recovered, agreement, transferred, cost, scored
    )
    found = {claim.id: (claim.verdict, claim.unit) for claim in claims}
    assert found["experts-half"] == ("reproduced", "% of COMET")
    assert found["experts-75-recovered"] == ("not reproduced", "% of COMET")


def test_a_base_model_is_asked_by_examples_of_the_training_text(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path))
    asked = study.start(Params(**{**TINY, "prompt": "few_shot"}))
    test = asked.tests["en-fr"]
    examples = asked.pairs("en", "fr", "examples", 3)
    assert all(prompt.count("English:") == 4 and prompt.endswith("French:") for prompt in test.prompts)
    assert all(pair.target in test.prompts[0] for pair in examples)
    assert all(target.startswith(" ") and target.endswith("\n") for target in test.targets)
    assert not test.ends
    assert asked.tests["fr-en"].prompts[0].endswith("English:")
    found = asked.losses("unpruned", asked.model, ["en-fr", "news"])
    assert np.isfinite(found["en-fr"]).all()
    assert asked.prompter.stop == "\n"
    calibration = calibrations.calibrate(asked)
    assert np.allclose(calibration.of("de").routing_mass.sum(axis=1), 1)


def test_an_instruction_model_is_asked_through_its_chat_template(tmp_path, monkeypatch):
    load = study.models.load

    def with_template(*args, **options):
        model, tokenizer = load(*args, **options)
        tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}:"
        return model, tokenizer

    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path))
    monkeypatch.setattr(study.models, "load", with_template)
    asked = study.start(Params(**{**TINY, "prompt": "chat"}))
    pair = asked.pairs("en", "fr", "test", 8)[0]
    prompt = asked.tests["en-fr"].prompts[0]
    assert prompt.startswith("[Translate the following text from English into French.")
    assert prompt.endswith(f"{pair.source}]:")
    assert np.isfinite(asked.losses("unpruned", asked.model, ["de-en"])["de-en"]).all()


def test_sentences_of_the_hub_are_split_into_calibration_and_test(tmp_path, monkeypatch):
    splits = []

    def wmt24pp(target, *, n, seed):
        return study.parallel.verse_pairs("en", target, "validation", n=n)

    def flores(source, target, split, *, n, seed):
        splits.append(split)
        return study.parallel.verse_pairs(source, target, "test" if split == "devtest" else "train", n=n)

    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path))
    monkeypatch.setattr(study.parallel, "flores", flores)
    asked = study.start(Params(**{**TINY, "corpus": "flores"}))
    for part in ("calibration", "training", "test"):
        assert len(asked.pairs("en", "fr", part, 8)) == 8
    assert splits == ["dev", "dev", "dev", "devtest"]  # the first when the study starts
    monkeypatch.setattr(study.parallel, "wmt24pp", wmt24pp)
    assert asked.tests["wmt24++ en-de"].group == "wmt24++"
    assert "wmt24++ en-it" not in asked.tests


def test_without_recovery_less_memory_is_asked_for_and_its_figure_still_drawn(
    tmp_path, monkeypatch, base, swept, translated
):
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path))
    asked = study.start(Params(**{**TINY, "recovery_shares": ()}))
    found = recovery.recover(asked, base, swept, translated, {})
    assert found.table.empty
    assert not found.change
    plots.plot_quality(asked, translated, found)


def test_a_model_that_cannot_fit_is_refused(monkeypatch):
    monkeypatch.setattr("overparam.models.memory.required_memory", lambda *_, **__: 10**15)
    with pytest.raises(MemoryError, match="needs about"):
        study.start(Params(**TINY))


COMET = """#!{python}
import json, sys
value = dict(zip(sys.argv[1::2], sys.argv[2::2]))
lines = open(value["-t"], encoding="utf-8").read().splitlines()
json.dump({{"t": [{{"COMET": len(line) / 1000}} for line in lines]}}, open(value["--to_json"], "w"))
"""


def test_every_translation_is_scored_by_comet_once_more(tmp_path, monkeypatch):
    command = tmp_path / "comet-score"
    command.write_text(COMET.format(python=sys.executable))
    command.chmod(0o755)
    monkeypatch.setenv("OVERPARAM_COMET", str(command))
    monkeypatch.setenv("OVERPARAM_JOB_DIR", str(tmp_path / "job"))
    asked = study.start(Params(**{**TINY, "comet": "some/model"}))
    name = sweep.System(0.5, *sweep.PUBLISHED).name
    rows = [
        ("unpruned", 0.0, None, None, None, "abcd"),
        (name, 0.5, 0, None, None, "abc"),
        ("random 0, uniform budgets", 0.5, 0, None, None, "a"),
        ("random 1, uniform budgets", 0.5, 1, None, None, "abc"),
        ("recovered", 0.5, 42, "parent", "all parameters", ""),
    ]
    for system, share, seed, targets, trained, text in rows:
        for language in asked.params.languages:
            asked.written.append(
                pd.DataFrame(
                    {
                        "system": system, "share": share, "seed": seed, "targets": targets, "trained": trained,
                        "test": f"translated en-{language}", "item": range(8), "source": "s", "reference": "r",
                        "translation": text, "failure": "" if text else "empty",
                    }
                )
            )  # fmt: skip
    found = comet.comet_scores(asked)
    values = {key[:2]: (change.value, change.low) for key, change in found.change.items()}
    assert values[name, 0.5] == pytest.approx((-25, -25))
    assert values["random, uniform budgets", 0.5] == pytest.approx((-50, -75), abs=1e-6)
    assert values["recovered", 0.5] == (-100, -100)
    table = pd.read_csv(tmp_path / "job" / "comet.csv")
    assert table["comet"].tolist() == pytest.approx([0.004, 0.003, 0.002, 0.0])
    by_item = pd.read_parquet(tmp_path / "job" / "comet.parquet")
    assert len(by_item) == 5 * 2 * 8


def test_without_a_model_there_are_no_comet_scores_and_without_the_command_no_start(started, monkeypatch):
    assert comet.comet_scores(started) is None
    monkeypatch.setenv("OVERPARAM_COMET", "no-such-command")
    with pytest.raises(RuntimeError, match="pipx install"):
        study.start(Params(**{**TINY, "comet": "Unbabel/XCOMET-XL"}))
