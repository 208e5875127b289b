"""Quantised K/V: what they cost, how far off they are, and that answers stay."""

import pytest
import torch
from kv_samples import random_kv
from voco_llama import VocoLlavaForConditionalGeneration
from voco_llama.demo import MODEL
from voco_llama.demo.evaluate import heldout

from voco_kernels import VocoKV

QUANTISED = {torch.int8: 1 / 254, torch.float8_e4m3fn: 1 / 16}  # largest rounding error, in parts of a row's largest number


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_numbers_are_rounded_to_the_nearest(dtype, source):
    kv = random_kv(source, tokens=40, head_dim=32, segments=[(9, 40)], meta={"model": "m"})
    got = kv.quantised(dtype)
    assert got.k.dtype == got.v.dtype == dtype and got.k_scale.dtype == torch.float32
    assert got.segments == kv.segments and got.meta == kv.meta
    for x, q, scale in ((kv.k, got.k, got.k_scale), (kv.v, got.v, got.v_scale)):
        largest = x.float().abs().amax(-1)
        back = q.double() * scale[..., None].double()
        error = (back - x.double()).abs().amax(-1)
        assert (error <= 1.001 * QUANTISED[dtype] * largest).all()
        # The largest number of each row is kept, but for float32's own rounding.
        torch.testing.assert_close(back.abs().amax(-1), largest.double(), rtol=1e-6, atol=0)
    again = got.dequantised(torch.float32)
    torch.testing.assert_close(again.k, (got.k.float() * got.k_scale[..., None]), rtol=0, atol=0)
    assert got.dequantised(torch.bfloat16).k.dtype == torch.bfloat16 and again.k_scale is None


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_rows_of_zeros_and_of_tiny_numbers(dtype):
    x = torch.zeros(1, 3, 1, 4)
    x[0, 1], x[0, 2] = 1e-44, torch.tensor([3.0, -1.0, 0.0, 1e-30])
    kv = VocoKV(x, x.clone()).quantised(dtype).dequantised()
    assert kv.k.isfinite().all() and (kv.k[0, :2].abs() <= 1e-40).all() and float(kv.k[0, 2, 0, 0]) == pytest.approx(3.0)


def test_bad_input():
    kv = random_kv()
    with pytest.raises(ValueError, match="^dtype must be int8 or float8_e4m3fn, but was torch.float16"):
        kv.quantised(torch.float16)
    with pytest.raises(ValueError, match="^kv must be not quantised"):
        kv.quantised().quantised()
    with pytest.raises(ValueError, match="^kv must be quantised, but was torch.float32"):
        kv.dequantised()
    with pytest.raises(ValueError, match="^dtype must be float16"):
        kv.quantised().dequantised(torch.int8)
    for bad in (float("nan"), float("inf")):
        v = kv.v.clone()
        v[0, 0, 0, 0] = bad
        with pytest.raises(ValueError, match="^v must be finite"):
            VocoKV(kv.k, v).quantised()
    assert random_kv(tokens=0).quantised().num_tokens == 0


def test_storage_of_llava():
    """LLaVA-1.5-7B in float16, as in table 7 of the paper: 302 MB for 576 vision tokens, 0.525 MB for a VoCo token."""
    token = VocoKV(*torch.zeros(2, 32, 1, 32, 128, dtype=torch.float16))
    assert round(576 * token.nbytes / 1e6) == 302 and round(token.nbytes / 1e6, 3) == 0.524
    assert 1 - 1 / 576 > 0.998
    for dtype in QUANTISED:
        assert token.quantised(dtype).nbytes / token.nbytes <= 0.53


@pytest.fixture(scope="module")
def model():
    return VocoLlavaForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()


def greedy(model, samples, kv) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [samples, V] of the first token of each answer, and the whole answers [samples, 4]."""
    prompts = [model.processor.prompt(sample.questions[0].text) for sample in samples]
    inputs = model.processor(None, prompts)
    out = model.generate(
        **inputs, voco_kv=kv, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return out.logits[0], out.sequences[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("questions", [60, pytest.param(600, marks=pytest.mark.full)])
def test_answers_stay(model, questions):
    samples = heldout(questions)
    plain = model.compress([sample.image for sample in samples])
    exact, answers = greedy(model, samples, plain)
    for dtype, allowed in ((torch.int8, 1e-2), (torch.float8_e4m3fn, 1e-1)):
        got, given = greedy(model, samples, [kv.quantised(dtype) for kv in plain])
        error = float(((got - exact).abs().amax(1) / exact.abs().amax(1)).max())
        width = min(given.shape[1], answers.shape[1])
        same = float((given[:, :width] == answers[:, :width]).all(1).float().mean())
        print(f"{dtype}: logits {error:.1e} off, {same:.1%} of {questions} answers stay")
        assert error <= allowed and same >= 0.99, dtype


def test_scales_that_underflow_change_no_sign():
    """185 of the smallest float32 numbers would have 1.46 of them as its scale, rounded to 1: int8 would wrap to -71."""
    for dtype, steps, kept in ((torch.int8, 185, 127), (torch.float8_e4m3fn, 600, 448)):
        x = torch.full((1, 1, 1, 4), steps * 2.0**-149)
        x[..., 1] *= -1
        got = VocoKV(x, x.clone()).quantised(dtype).k.float().flatten().tolist()
        assert got == [kept, -kept, kept, kept]
