"""Inversion: the optimization against its plain algorithm, and the value that carries it around."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from mde_edit import Inversion
from mde_edit.attention_processors import gradient
from safetensors.torch import save_file

from .conftest import LATENTS, SOURCE, TARGET, count_unet_calls, make_pipe


@pytest.mark.parametrize("scheduler", [{}, {"prediction_type": "v_prediction"}, {"timestep_spacing": "trailing"}])
def test_ddim_inversion_is_undone_by_sampling_with_its_own_predictions(components, image, scheduler):
    """z_t -> z_{t+1} -> z_t is the identity when both steps use the same prediction: levels and formulas agree."""
    pipe = make_pipe(components, **scheduler)
    forward, inverse = pipe.ddim_scheduler(5), pipe.ddim_scheduler(5, inverse=True)
    assert inverse.timesteps.tolist() == forward.timesteps.tolist()[::-1]
    torch.manual_seed(0)
    z, noise = torch.randn(1, 4, *LATENTS), torch.randn(1, 4, *LATENTS)
    for t in inverse.timesteps:
        up = inverse.step(noise, t, z).prev_sample
        a, b = forward.alphas_cumprod[t], forward.alphas_cumprod[t - 200] if t >= 200 else forward.final_alpha_cumprod
        if scheduler.get("prediction_type") == "v_prediction":
            eps = b.sqrt() * noise + (1 - b).sqrt() * z
            x0 = b.sqrt() * z - (1 - b).sqrt() * noise
            assert torch.allclose(up, a.sqrt() * x0 + (1 - a).sqrt() * eps, atol=1e-5)
        else:
            assert torch.allclose(forward.step(noise, t, up).prev_sample, z, atol=1e-4)
            x0 = (z - (1 - b).sqrt() * noise) / b.sqrt()
            assert torch.allclose(up, a.sqrt() * x0 + (1 - a).sqrt() * noise, atol=1e-4)


def test_null_text_equals_its_plain_algorithm(pipe, image):
    """Algorithm 1 of arXiv 2212.09794, written out, with the official stopping rule for 50 steps scaled to n."""
    n, scale, inner = 4, 3.0, 3
    result = pipe.invert(image, SOURCE, n, guidance_scale=scale, num_inner_steps=inner, early_stop_epsilon=1e-5)
    trajectory = pipe.invert(image, SOURCE, n, method="direct").latents
    scheduler, unet = pipe.ddim_scheduler(n), pipe.unet
    cond_embeds, null = pipe.embed(SOURCE).detach(), pipe.embed("").detach()
    z, expected = trajectory[:1], []
    for i, t in enumerate(scheduler.timesteps):
        null = null.clone().detach().requires_grad_()
        optimizer = torch.optim.Adam([null], lr=1e-2 * (1 - (i * 50 / n) / 100))
        for _ in range(inner):
            cond = unet(z, t, encoder_hidden_states=cond_embeds).sample.detach()
            uncond = unet(z, t, encoder_hidden_states=null).sample
            loss = F.mse_loss(
                scheduler.step(uncond + scale * (cond - uncond), t, z).prev_sample, trajectory[i + 1 : i + 2]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if loss.item() < 1e-5 + (i * 50 / n) * 2e-5:
                break
        with torch.no_grad():
            uncond = unet(z, t, encoder_hidden_states=null).sample
            z = scheduler.step(uncond + scale * (cond - uncond), t, z).prev_sample
        expected.append(z)
    unet.zero_grad()
    assert torch.allclose(result.latents[1:], torch.cat(expected), atol=1e-4)
    assert result.null_embeds.shape == (n, 77, 16) and result.null_embeds.dtype == torch.float32


@pytest.mark.parametrize("method,per_step", [("direct", 1), ("negative_prompt", 2)])
def test_pass_counts_without_optimization(pipe, image, method, per_step):
    with count_unet_calls(pipe.unet) as calls:
        pipe.invert(image, SOURCE, num_inference_steps=4, method=method)
    assert calls["forward"] == calls["batch 1"] == 4 * per_step


def test_pass_counts_of_null_text(pipe, image):
    """Per step: one of the inversion, one conditional, one per update, one with the final embedding."""
    with count_unet_calls(pipe.unet) as calls:
        pipe.invert(image, SOURCE, num_inference_steps=4, num_inner_steps=3, early_stop_epsilon=0.0)
    assert calls["forward"] == 4 * (2 + 3 + 1)
    with count_unet_calls(pipe.unet) as calls:  # a threshold nothing exceeds: one update each
        pipe.invert(image, SOURCE, num_inference_steps=4, num_inner_steps=3, early_stop_epsilon=1e9)
    assert calls["forward"] == 4 * (2 + 1 + 1)


def test_null_text_brings_the_source_branch_closer_to_the_inversion(pipe, image):
    trajectory = pipe.invert(image, SOURCE, 5, method="direct").latents
    few = pipe.invert(image, SOURCE, 5, guidance_scale=5.0, num_inner_steps=1, early_stop_epsilon=0.0).latents
    many = pipe.invert(image, SOURCE, 5, guidance_scale=5.0, num_inner_steps=20, early_stop_epsilon=0.0).latents
    assert F.mse_loss(many[-1], trajectory[-1]) < 0.8 * F.mse_loss(few[-1], trajectory[-1])


def test_direct_reconstruction_is_the_vae_round_trip(pipe, inversion, image):
    latents = pipe.vae.encode(pipe.prepare_image(image, None, None)).latent_dist.mode()
    assert torch.equal(inversion.latents[-1:], latents)
    out = pipe(TARGET, inversion, output_type="pt")
    decoded = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(out.source_images, decoded, atol=1e-4)


@pytest.mark.parametrize("method", ["null_text", "negative_prompt"])
def test_same_prompt_without_losses_is_the_reconstruction(pipe, image, method):
    inverted = pipe.invert(image, SOURCE, 5, method=method, guidance_scale=3.0, num_inner_steps=2)
    out = pipe(SOURCE, inverted, output_type="latent")
    assert torch.allclose(out.images, inverted.latents[-1:], atol=2e-4)


@pytest.mark.parametrize("method", ["null_text", "direct"])
def test_save_and_load(pipe, image, masks, tmp_path, method):
    inverted = pipe.invert(image, SOURCE, 3, method=method, guidance_scale=2.0, num_inner_steps=1)
    inverted.save(tmp_path / "cat.safetensors")
    for loaded in (
        Inversion.load(tmp_path / "cat.safetensors"),
        pipe.load_inversion(str(tmp_path / "cat.safetensors")),
    ):
        for name, value in vars(inverted).items():
            other = getattr(loaded, name)
            assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value
    edit = {"object_masks": {"dog": masks[0]}, "optimization_iterations": 1, "output_type": "latent"}
    assert torch.equal(pipe(TARGET, loaded, **edit).images, pipe(TARGET, inverted, **edit).images)


def test_a_file_that_is_no_inversion_is_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"format": "pt", "y": json.dumps(1)})
    with pytest.raises(ValueError, match="x.safetensors' is not an inversion"):
        Inversion.load(tmp_path / "x.safetensors")


def test_an_inversion_of_another_model_schedule_or_setting_is_refused(components, pipe, image, inversion):
    other = make_pipe(components, prediction_type="v_prediction")
    with count_unet_calls(pipe.unet) as calls:
        with pytest.raises(ValueError, match="another noise schedule"):
            other(TARGET, inversion)
        with pytest.raises(ValueError, match="`num_inference_steps` is 7 and the inversion was made with 5"):
            pipe(TARGET, inversion, num_inference_steps=7)
        with pytest.raises(ValueError, match="another model"):
            weight = pipe.unet.conv_in.weight
            before = weight.data.clone()
            weight.data *= 1.005
            try:
                pipe(TARGET, inversion)
            finally:
                weight.data.copy_(before)
        assert calls["probe"] == 2 == sum(calls.values())
    null_text = pipe.invert(image, SOURCE, 2, guidance_scale=3.0, num_inner_steps=1)
    with pytest.raises(ValueError, match="`guidance_scale` is 4.0 and the null-text inversion was made for 3.0"):
        pipe(TARGET, null_text, guidance_scale=4.0)
    pipe(TARGET, inversion, guidance_scale=4.0)  # nothing in a direct inversion depends on it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_inversion_serves_the_same_model_in_another_dtype(components, image, inversion, dtype):
    pipe = make_pipe(copy.deepcopy(components)).to(dtype)
    pipe(TARGET, inversion, output_type="latent")
    half = pipe.invert(image, SOURCE, 2, "direct")
    pipe.to(torch.float32)  # the same rounded weights, computed with in full
    pipe(TARGET, half, output_type="latent")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"prompt": ""}, "`prompt` is ''"),
        ({"prompt": None}, "`prompt` is None"),
        ({"prompt": "cat " * 80}, "has 80 tokens and the text encoder reads 75"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0: use a whole number from 1 to 1000"),
        ({"num_inference_steps": 1001}, "from 1 to 1000"),
        ({"num_inference_steps": 2.5}, "whole number"),
        ({"method": "magic"}, "choose one of 'null_text', 'negative_prompt', 'direct'"),
        ({"guidance_scale": 1.0}, "needs `guidance_scale` > 1"),
        ({"guidance_scale": 0.5, "method": "direct"}, "`guidance_scale` is 0.5: use a number of at least 1"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` is nan"),
        ({"num_inner_steps": 0}, "`num_inner_steps` is 0"),
        ({"early_stop_epsilon": -1.0}, "`early_stop_epsilon` is -1.0"),
        ({"image": "cat.png"}, "pass a PIL image"),
        ({"image": None}, "pass a PIL image"),
        ({"image": torch.full((3, 64, 64), float("nan"))}, "not finite"),
        ({"image": torch.zeros(2, 3, 64, 64)}, "pass one picture"),
        ({"image": torch.zeros(64, 64)}, "pass one picture"),
        ({"image": torch.zeros(1, 64, 64)}, "1 channels and the VAE reads 3"),
        ({"image": [torch.zeros(3, 64, 64)] * 2}, "one picture at a time"),
    ],
)
def test_bad_input_is_refused_before_any_pass(pipe, image, change, message):
    with count_unet_calls(pipe.unet) as calls, pytest.raises(ValueError, match=message):
        pipe.invert(**{"image": image, "prompt": SOURCE, **change})
    assert not calls


def test_pictures_in_every_form_give_the_same_inversion(pipe, image):
    import PIL.Image

    forms = [
        image,
        PIL.Image.fromarray(image),
        PIL.Image.fromarray(image).convert("RGBA"),
        [PIL.Image.fromarray(image)],
        image / 255.0,
        torch.from_numpy(image).permute(2, 0, 1),
        torch.from_numpy(image).permute(2, 0, 1)[None] / 255,
    ]
    first, *others = [pipe.invert(form, SOURCE, 1, method="direct").latents for form in forms]
    assert all(torch.allclose(first, other, atol=1e-5) for other in others)


def test_a_picture_is_resized_on_request_and_rounded_down_otherwise(pipe, image):
    assert pipe.invert(image[:63, :95], SOURCE, 1, method="direct").latents.shape[-2:] == (7, 11)
    assert pipe.invert(image, SOURCE, 1, method="direct", height=32, width=48).latents.shape[-2:] == (4, 6)


def test_divergence_is_named(pipe, image, monkeypatch):
    monkeypatch.setattr(pipe.unet.conv_out, "forward", lambda x: torch.full((len(x), 4, *x.shape[2:]), float("nan")))
    with pytest.raises(FloatingPointError, match="load it in float32"):
        pipe.invert(image, SOURCE, 2)


def test_gradients_survive_a_half_precision_model():
    """Through fp16 a mean over a latent has gradients below the smallest number: scaled, they come out right."""
    inputs = torch.linspace(0.5, 1.5, 4096).requires_grad_()
    slope = torch.tensor(2e-5, dtype=torch.float16)  # a weight on the way back
    loss = (inputs.half() * slope).float().mean()
    assert torch.autograd.grad(loss, inputs, retain_graph=True)[0].abs().max() == 0
    expected = torch.full_like(inputs, float(slope) / 4096)
    assert torch.allclose(gradient(loss, inputs, torch.float16), expected, rtol=1e-2, atol=0)


def test_a_picture_far_from_the_training_size_is_warned_about(pipe, image, caplog):
    pipe.invert(image, SOURCE, 1, method="direct")
    assert "was trained at" not in caplog.text
    pipe.invert(image, SOURCE, 1, method="direct", height=96, width=128)
    assert "The picture is 128x96, the model was trained at 64x64: expect repeated objects" in caplog.text
    caplog.clear()
    pipe.check_picture(image, SOURCE, 1, "direct", 7.5, height=32, width=48)
    assert "was trained at" not in caplog.text
    pipe.check_picture(image, SOURCE, 1, "direct", 7.5, height=24, width=64)
    assert "The picture is 64x24, the model was trained at 64x64: expect pictures worse" in caplog.text
