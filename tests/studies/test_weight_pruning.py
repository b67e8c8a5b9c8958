import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from overparam.compress import weights
from overparam.record import record, stats
from overparam.studies.weight_pruning import Params, plots, study, verdicts

TINY = {
    "sparsities": (0.5,),
    "control_seeds": (0, 1),
    "calibration_texts": 8,
    "fewer_texts": (4,),
    "text_length": 16,
    "tasks": ("ReutersR8",),
    "max_items": 20,
    "test_kinds": ("code",),
    "test_texts": 4,
    "probe_texts": 2,
    "bits": (4,),
    "layer_shares": (0.5,),
    "product_tokens": (1,),
    "product_sparsities": (0.5,),
    "cost_texts": 2,
    "cost_repeats": 3,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("wanda",)}, "methods must have magnitude"),
        ({"methods": ("magnitude", "owl")}, "'owl' is not"),
        ({"sparsities": (0.5, 1.0)}, "less than 1"),
        ({"sparsities": (0.0,)}, "greater than 0"),
        ({"fewer_texts": (32,)}, "below calibration_texts = 32"),
        ({"test_kinds": ("poems",)}, "'poems' is not"),
        ({"model": "all-MiniLM-L6"}, "did you mean"),
    ],
)
def test_bad_parameters_are_refused_at_once(change, message):
    with pytest.raises(ValidationError, match=message):
        Params(**change)


@pytest.fixture(scope="module", params=["tiny-bert", "tiny-qwen3_moe"])
def started(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OVERPARAM_JOB_DIR", str(tmp_path_factory.mktemp("job")))
        yield study.start(Params(**TINY, model=request.param))


@pytest.fixture(scope="module")
def found(started):
    return study.quality(started)


def test_weights_are_put_back_after_every_system(started):
    before = [matrix.weight.clone() for matrix in started.matrices]
    with started.pruned(study.System("wanda", 0.5)) as model:
        assert weights.count_zeros(model).of_layers == pytest.approx(0.5, abs=0.02)
    assert all(torch.equal(a, b.weight) for a, b in zip(before, started.matrices, strict=True))
    with pytest.raises(ZeroDivisionError), started.pruned(study.System("magnitude", 0.5)):
        raise ZeroDivisionError
    assert all(torch.equal(a, b.weight) for a, b in zip(before, started.matrices, strict=True))


def test_every_method_and_control_is_scored_beside_the_unpruned_model(started, found):
    table = found.table.set_index(["system", "pattern"])
    methods = {"magnitude", "wanda", "sparsegpt", "wanda_refit", "random"}
    assert set(table.index) >= {(name, pattern) for name in methods for pattern in ("", "2:4")}
    assert ("inverted", "") in table.index
    assert table.loc[("unpruned", ""), "kept"] == pytest.approx(100)
    assert table.loc[("unpruned", ""), "moved"] == pytest.approx(0, abs=1e-6)
    rest = table.drop(index=[("unpruned", ""), ("bag of words", "")], errors="ignore")
    counts = weights.count_zeros(started.model)
    assert rest["zeros"].to_numpy() == pytest.approx(50 * counts.layers / counts.total, rel=0.05)
    assert (rest["moved"] > 0).all()
    assert (("bag of words", "") in table.index) != started.decoder
    assert set(found.against) == set(study.PAIRS)


def test_the_calibration_is_changed_one_thing_at_a_time(started):
    table = study.calibration(started)
    assert table["texts"].tolist() == [8, 4, 8, 8]
    assert (table["kept_low"] <= table["kept_high"]).all()
    plots.plot_calibration(started, table)


def test_bytes_are_those_of_the_format(started, found):
    table = study.equal_bytes(started, found).set_index(["kind", "system"])["bytes_percent"]
    assert table["wanda", "50% zeros"] == pytest.approx(100 * (8 + 1) / 16)
    layers = len(study.models.blocks(started.model.base_model).layers)
    kept = round(layers / 2)
    assert table["fewer layers", f"{kept} of {layers} layers"] == pytest.approx(100 * kept / layers, abs=1)
    assert 100 * 4 / 16 < table["rounded", "4 bits"] < 100 * 8 / 16


def test_the_whole_study_leaves_a_complete_record(started, found):
    timed = study.times(started)
    assert timed.products["times_as_fast"].gt(0).all()
    for figure in (
        plots.plot_quality(started, found),
        plots.plot_bytes(started, study.equal_bytes(started, found)),
        plots.plot_times(started, timed),
    ):
        assert figure is not None
    claims = verdicts.verdicts(started, found, timed)
    ids = [claim.id for claim in claims]
    assert len(set(ids)) == len(ids) == 7
    by_id = {claim.id: claim for claim in claims}
    assert by_id["weights-30-wanda"].verdict == "not testable at this scale"  # no 30 % in this run
    started.finish()
    assert record.problems(record.load(started.recorder.directory)) == []


def test_verdicts_follow_the_intervals(started, found):
    kept = {key: stats.Estimate(99.5, 99.0, 100.0, 9) for key in found.kept}
    kept["magnitude", 0.5, ""] = stats.Estimate(80.0, 75.0, 85.0, 9)
    against = {name: stats.Estimate(5.0, 1.0, 9.0, 9) for name in study.PAIRS}
    fake = study.Quality(found.table, kept, against)
    timed = study.Times(pd.DataFrame(), stats.Estimate(0.5, -1.0, 2.0, 9))
    by_id = {claim.id: claim.verdict for claim in verdicts.verdicts(started, fake, timed)}
    assert by_id["weights-50-wanda"] == "reproduced"
    assert by_id["weights-50-magnitude"] == "not reproduced"
    assert by_id["weights-wanda"] == by_id["weights-2-4"] == by_id["weights-time"] == "reproduced"


def test_texts_are_whole_and_enough(started):
    assert len(started.texts("code", "train", 3)) == 3
    with pytest.raises(ValueError, match="texts, 1000000 are asked for"):
        started.texts("code", "train", 1_000_000)
    masks = [batch["attention_mask"] for batch in started.batches]
    assert sum(len(mask) for mask in masks) == 8
    assert max(int(mask.sum(1).max()) for mask in masks) <= 16
    assert np.all([mask.sum() > 0 for mask in masks])
