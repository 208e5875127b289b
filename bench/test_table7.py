"""Table 7 of the paper: the demo model on a CPU, the shapes of LLaVA-1.5-7B and of Llama-3-8B on a GPU."""

import pytest
from voco_llama.bench.table7 import Settings, comparisons

MODELS = {"cpu": ("demo",), "cuda": ("llava-7b", "llama3-8b")}


@pytest.mark.parametrize("model", [model for models in MODELS.values() for model in models])
def test_table7(benchmark, model, device, session, add_comparison):
    benchmark.skipped = True  # it times itself
    if model not in MODELS[device.type]:
        pytest.skip(f"{model} is not for a {device.type}")
    settings = Settings(seconds=session.seconds)
    # One model makes all of them, so it is loaded again where any failed or is not there.
    if all(session.results.has(*key) for key in settings.keys(device, model)):
        pytest.skip("it is in the results already")
    failed = []
    for comparison in comparisons(device, model, settings):
        if not session.results.has(comparison.suite, comparison.task, comparison.shape):
            add_comparison(comparison)
        failed += [f"{comparison.task}, {row.name}: {row.status}" for row in comparison.rows if row.status != "ok"]
    assert not failed, "; ".join(failed)
