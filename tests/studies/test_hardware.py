from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from overparam.measure import tune
from overparam.models import shape_costs
from overparam.record import ledger
from overparam.studies.hardware import Params, costs, priced_records, settings, sizes, study, verdicts
from overparam.studies.hardware.settings import AGAIN, Sweep, Tuning


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schemes": ("openvino-fp32",)}, "schemes must have fp32"),
        ({"decoder_schemes": ("bf16",)}, "decoder_schemes must have fp32"),
        ({"schemes": ("fp32", "onnx")}, "'onnx' is not"),
        ({"joint_length": 32}, "joint_length"),
        ({"aligned_width": 100}, "aligned_width must be among"),
        ({"default_batch": 5}, "default_batch must be among"),
        ({"shapes_by_layers": ("Llama-9",)}, "there is no shape 'Llama-9'"),
        ({"price_per_hour": 0}, "greater than 0"),
        ({"price_per_hour": -1}, "greater than 0"),
        ({"utilisation": 0}, "greater than 0"),
        ({"tuning_share": 1.0}, "less than 1"),
        ({"threads": (0,)}, "greater than or equal to 1"),
        ({"results": "nowhere"}, "there is no results folder 'nowhere'"),
        ({"bits": (3,)}, "8 or 4"),
    ],
)
def test_bad_parameters_are_refused_at_once(change, message):
    with pytest.raises(ValidationError, match=message):
        Params(**change)


def test_more_threads_than_cores_are_refused(monkeypatch):
    monkeypatch.setattr(study, "cores", lambda: 1)
    with pytest.raises(ValueError, match="threads must be at most 1, the cores of this machine, got 2"):
        study.start(Params(threads=(1, 2)))


def test_the_price_of_a_million_follows_from_speed_price_and_use():
    assert costs.per_million(100, 3.6) == pytest.approx(10)  # 360,000 an hour
    assert costs.per_million(100, 3.6, 0.5) == pytest.approx(20)
    for wrong in ((0, 1, 1), (1, 0, 1), (1, -1, 1), (1, 1, 0), (1, 1, 1.5)):
        with pytest.raises(ValueError, match="above 0"):
            costs.per_million(*wrong)


def recorded(**params):
    tables, found = {}, []
    recorder = SimpleNamespace(table=lambda name, table: tables.update({name: table}), claim=found.append)
    return SimpleNamespace(
        params=Params(**params),
        recorder=recorder,
        threads=[1, 2],
        tables=tables,
        claims=found,
        default="the default",
    )


def test_costs_are_those_of_the_committed_records():
    here = recorded(price_per_hour=0.36, utilisation=1.0)
    table = costs.costs(here)
    assert set(table["study"]) >= {"trailing_layer_pruning", "moe_expert_pruning", "quantization_accuracy"}
    assert len(priced_records(here.params)) >= table.groupby(["study", "model"]).ngroups
    np.testing.assert_allclose(table["eur_per_million"], 100 / table["per_second"])
    assert table["energy_method"].notna().all()
    whole = table[(table["model"] == "Gemma") & (table["system"] == "depth 18")].iloc[0]
    assert whole["kept"] == pytest.approx(100)
    assert whole["unit"] == "tokens read"


def test_a_shape_that_does_not_fit_is_a_row_with_its_reason():
    def refuse():
        raise MemoryError("Llama-3-8B needs 17.2 GiB in bfloat16, 1.0 GiB are free: keep fewer")

    (row,) = sizes._guarded(SimpleNamespace(release=lambda: None), "Llama-3-8B", "time by layers", refuse)
    assert row == {
        "shape": "Llama-3-8B", "what": "time by layers",
        "status": "needs 17.2 GiB in bfloat16, 1.0 GiB are free: keep fewer",
    }  # fmt: skip


def test_extrapolated_layers_are_marked():
    found = pd.DataFrame(
        [{"layers": n, "round": r, "seconds": 0.1 * n + 0.2} for n in (4, 8, 16) for r in range(5)]
    )
    rows = pd.DataFrame(shape_costs.time_rows(found, 80, "torch.float32"))
    far = rows[rows["kept"] == 80].iloc[0]
    assert far["seconds"] == pytest.approx(8.2)
    assert far["status"] == "extrapolated by layer from 16 of 80 layers"
    assert rows[rows["kept"] == 8].iloc[0]["share"] == pytest.approx(100 / 1.8)
    assert rows[rows["what"] == "slope"].iloc[0]["share"] == pytest.approx(1.2 / 1.35, rel=0.02)


def frame(columns, *rows):
    return pd.DataFrame(list(rows), columns=columns.split())


def test_memory_is_compared_with_the_share_of_the_parameters():
    found = frame("experts parameters weight_bytes resident_bytes", (16, 25, 50, 52), (64, 100, 200, 200))
    first = next(iter(shape_costs.memory_rows(found, "experts", "torch.bfloat16")))
    assert (first["share"], first["expected"]) == (26, 25)


def test_one_setting_is_compared_with_another_by_the_same_rounds():
    slow = [1 + number for number in range(6)]
    rows = [(r, cell, s * f, 2.0 * f) for r, f in enumerate(slow) for cell, s in (("a", 1.0), ("b", 0.5))]
    rounds = frame("round cell seconds reference", *rows)
    assert settings._between(rounds, "a", "b")["ratio"] == pytest.approx(0.5)
    assert settings._between(rounds, "b", "the default")["ratio"] == pytest.approx(4)


def around(value, by):
    return value, value - by, value + by


def judged(*, token=1.5, holds=19, gain=1.7, **params):
    """The verdicts on made-up tables."""
    here = recorded(shape_dtypes=("float32",), **params)
    limits = frame(
        "threads what best unit",
        (2, "float32", 1e11, "FLOP/s"), (2, "copy", 1e10, "byte/s"), (2, "read", 1e10, "byte/s"),
    )  # fmt: skip
    near = frame(
        "model phase scheme threads bound_by intensity times_bound times_bound_low times_bound_high "
        "least_times_bound seconds rounds",
        *(
            ("gemma-3-270m", phase, "fp32", 2, "bytes", 1.0, *around(value, 0.1), value, 1.0, 9)
            for phase, value in (("prompt", 1.5), ("token", token))
        ),
    )
    same = pd.DataFrame({"holds": [True] * holds + [False] * (20 - holds)})
    swept = frame(
        "cell scheme ratio ratio_low ratio_high grid status",
        ("the default", "fp32", 1.0, 1.0, 1.0, "joint", ""),
        ("fast", "openvino-int8", *around(1.7, 0.1), "joint", ""),
        ("fp32-compiled", "fp32-compiled", None, None, None, "not run", "no compiler"),
    )
    confirmed = frame(
        "role cell ratio ratio_low ratio_high rounds",
        *(
            (role, "fast", *around(ratio, 0.05), 30)
            for role, ratio in (("tuned", gain), ("best of the sweep", 1.7), (AGAIN, 1), ("tuned to best", 1))
        ),
    )
    aligned = frame(
        "layer dtype size speed speed_low speed_high rounds status",
        *(
            (layer, "float32", size, *around(speed, 1.0), 31, "")
            for layer, size, speed in (
                ("width", 641, 72.0), ("width", 640, 100.0), ("vocabulary", 50257, 99.0), ("vocabulary", 50304, 100.0),
            )
        ),
    )  # fmt: skip
    sized = frame(
        "shape what dtype kept whole share share_low share_high expected megabytes rounds status",
        ("S", "slope", "float32", 16, 16, *around(0.97, 0.02), 1.0, None, 7, ""),
        ("S", "memory by experts", "bfloat16", 16, 64, 29.0, None, None, 28.5, 1.0, None, ""),
        ("S", "token", "bfloat16", 8, 16, *around(1.95, 0.1), 1.95, 1.0, 7, ""),
        ("T", "slope", "float32", None, None, None, None, None, None, None, None, "needs 99 GiB"),
    )
    sweep, tuned = Sweep(swept, "fast", 100.0), Tuning(swept, "fast", 20.0, confirmed)
    verdicts.verdicts(here, limits, near, same, sweep, tuned, aligned, sized)
    return {claim.id: claim for claim in here.claims}


def test_verdicts_follow_from_the_tables():
    found = judged()
    assert found["hw-same"].verdict == "reproduced"
    assert found["hw-bound-prompt"].verdict == found["hw-bound-token"].verdict == "reproduced"
    assert found["hw-gain"].verdict == found["hw-gain-goal"].verdict == "reproduced"
    assert found["hw-gain"].measured.value == pytest.approx(70)
    assert found["hw-tuned-best"].verdict == "reproduced"
    assert found["hw-compile"].measured is None
    assert found["hw-compile"].note == "no compiler"
    assert found["hw-width-float32"].measured.value == pytest.approx(100 * (100 / 72 - 1))
    assert found["hw-width-float32"].verdict == "reproduced"
    assert (
        found["hw-vocabulary-float32"].verdict == "not reproduced"
        or found["hw-vocabulary-float32"].measured.low > 0
    )
    assert found["hw-time-layers-S"].verdict == "reproduced"
    assert found["hw-memory-experts-S"].verdict == "reproduced"
    assert found["hw-bits-8-S"].verdict == "inconclusive"
    assert found["hw-tpu"].verdict == "not testable at this scale"
    assert "hw-time-layers-T" not in found
    assert all(ledger.find(name) for name in found)


def test_verdicts_can_fail():
    found = judged(holds=16, token=2.5, gain=1.2)
    assert found["hw-same"].verdict == "not reproduced"
    assert found["hw-bound-token"].verdict == "not reproduced"
    assert found["hw-gain"].verdict == "reproduced"
    assert found["hw-gain-goal"].verdict == "not reproduced"


def test_without_a_decoder_its_checks_say_so():
    found = judged(decoder=None)
    assert found["hw-bound-prompt"].measured is None
    assert "No decoder" in found["hw-bound-token"].note


def test_the_goal_of_seventeen_in_twenty_is_met_by_seventeen():
    assert judged(holds=17)["hw-same"].verdict == "reproduced"
    assert tune.interval([0.0] * 5) == (1.0, 1.0, 1.0)
