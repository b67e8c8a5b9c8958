import pytest

from overparam import models
from overparam.compress import experts
from overparam.studies.moe_expert_pruning.costs import costs

TEXTS = ["In the beginning", "And God said, Let there be light: and there was light.", "Amen"]


@pytest.fixture(scope="module")
def twins():
    """Wide enough for their weights to outweigh what a process of the same kind needs anyway."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_local_experts": 16, "num_hidden_layers": 3}
    found = {share: models.tiny_twin("mixtral", causal=True, **sizes) for share in (0.0, 0.75)}
    experts.prune(found[0.75], [[0, 1, 2], [4, 5, 6, 7, 8, 9], [0, 1, 2]])
    return found


@pytest.fixture(scope="module")
def measured(twins):
    return costs(twins, models.tiny_tokenizer(), TEXTS, new_tokens=3, repeats=2)


def test_what_pruning_saves_and_what_it_does_not(measured, twins):
    table = measured[0].set_index("share_pruned")
    whole, pruned = table.loc[0.0], table.loc[0.75]
    assert whole.parameters == sum(parameter.numel() for parameter in twins[0.0].parameters())
    assert pruned.expert_parameters == whole.expert_parameters / 4
    assert pruned.active_parameters == pytest.approx(
        whole.active_parameters, rel=0.02
    )  # the router is smaller
    assert pruned.flops_per_token == 2 * pruned.active_parameters
    share = pruned.parameters / whole.parameters
    assert pruned.folder_bytes / whole.folder_bytes == pytest.approx(share, rel=0.03)
    assert pruned.resident_bytes / whole.resident_bytes == pytest.approx(share, rel=0.05)
    assert whole.resident_bytes == pytest.approx(4 * whole.parameters, rel=0.03)


def test_speed_counts_each_steps_tokens(measured):
    table, raw = measured
    prompts = sum(len(ids) for ids in models.tiny_tokenizer()(TEXTS)["input_ids"])
    for row in table.itertuples():
        assert row.prompt_tokens_per_second == pytest.approx(prompts / row.prompt_seconds)
        assert row.generate_one_tokens_per_second == pytest.approx(3 / row.generate_one_seconds)
        assert row.generate_all_tokens_per_second == pytest.approx(9 / row.generate_all_seconds)
        assert row.prompt_seconds_low <= row.prompt_seconds <= row.prompt_seconds_high
        assert row.kwh_per_million_tokens > 0
        assert row.energy_method
    assert raw.groupby(["share_pruned", "step"]).size().eq(2).all()
    assert len(raw) == 2 * 3 * 2
    assert raw.loc[raw.step == "generate_one", "texts"].eq(1).all()
    assert raw.loc[raw.step != "generate_one", "texts"].eq(3).all()


def test_generation_does_not_end_early(twins, monkeypatch):
    model = twins[0.0]
    lengths, generate = [], type(model).generate

    def recorded(self, **arguments):
        written = generate(self, **arguments)
        lengths.append(written.shape[1] - arguments["input_ids"].shape[1])
        return written

    monkeypatch.setattr(type(model), "generate", recorded)
    monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(3, 260)))
    costs({0.0: model}, models.tiny_tokenizer(), TEXTS[:1], new_tokens=4, repeats=1)
    assert set(lengths) == {4}


@pytest.mark.parametrize(("texts", "new_tokens", "repeats"), [([], 1, 1), (["a"], 0, 1), (["a"], 1, 0)])
def test_nothing_to_measure_is_refused(twins, texts, new_tokens, repeats):
    with pytest.raises(ValueError, match="at least one model, one text"):
        costs(twins, models.tiny_tokenizer(), texts, new_tokens=new_tokens, repeats=repeats)
