"""Guide-and-Rescale (Titov et al., ECCV 2024): DDIM inversion, then sampling under guidance that keeps layout and look.

At each guided step the source prompt's pass on the edited latents should have the self-attention and the features that
it has on the inverted ones; the gradient of how far it has not is added to the noise, rescaled by the norm of
classifier-free guidance. No masks and no optimized embeddings.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mde_edit import MDEEditPipeline
from mde_edit.attention_processors import Record, attention_control, attention_layers, gradient, predict
from mde_edit.conditioning import Conditioning
from PIL import Image

from benchmarks.cases import Case
from benchmarks.methods.base import Method


@contextmanager
def last_features(unet) -> Iterator[dict[str, torch.Tensor]]:
    """What the last up block put out in the latest pass: "features" -> (batch, channels, h, w)."""
    found = {}
    hook = unet.up_blocks[-1].register_forward_hook(lambda module, args, output: found.update(features=output))
    try:
        yield found
    finally:
        hook.remove()


def self_attention_energy(edited: Record, inverted: Record) -> torch.Tensor:
    """Scalar g_SA = sum_l mean (SA_l(z, src) - SA_l(z_inv, src))^2 (Sec. 4, self-attention guider)."""
    maps = (  # (1, heads, pixels, pixels)
        [
            (query.float() @ key.float().mT * query.shape[-1] ** -0.5).softmax(-1)
            for query, key in record.self_qk.values()
        ]
        for record in (edited, inverted)
    )
    return torch.stack([(one - other).square().mean() for one, other in zip(*maps)]).sum()


def feature_energy(edited: torch.Tensor, inverted: torch.Tensor) -> torch.Tensor:
    """Scalar g_F = mean |F(z, src) - F(z_inv, src)| of features (1, channels, h, w) (Sec. 4, feature guider)."""
    return (edited.float() - inverted.float()).abs().mean()


def rescale(guider: torch.Tensor, cfg: torch.Tensor, ratio: tuple[float, float]) -> torch.Tensor:
    """gamma * guider: of unchanged direction, its norm as a multiple of `cfg`'s clipped to `ratio` (Sec. 4, rescaling).

    Args:
        guider: gradient of the energies, (1, channels, h, w).
        cfg: classifier-free guidance w (eps_trg - eps_free), same shape.
        ratio: least and largest multiple.
    """
    own, reference = guider.norm(), cfg.norm()
    if own == 0 or reference == 0:
        return torch.zeros_like(guider)
    return guider * ((own / reference).clamp(*ratio) * reference / own)


@torch.no_grad()
def run(
    pipe: MDEEditPipeline,
    case: Case,
    steps: int,
    seed: int,
    guidance_scale: float,
    self_attention_weight: float,
    feature_weight: float,
    guided_steps: float,
    ratio: tuple[float, float],
) -> Image.Image:
    """Invert and sample with guidance over the first `guided_steps` of the steps. Deterministic: `seed` is not used."""
    unet, scheduler = pipe.unet, pipe.ddim_scheduler(steps)
    inversion = pipe.invert(case.image, case.source_prompt, steps, method="direct", guidance_scale=1.0)
    trajectory = inversion.latents.to(pipe.device)
    source = pipe.condition(case.source_prompt)
    both = Conditioning(torch.cat([pipe.embed(""), pipe.embed(case.target_prompt)]))
    layers = attention_layers(unet, trajectory.shape[-2:])
    self_layers = frozenset(layer.name for layer in layers if not layer.is_cross)

    def source_pass(latents: torch.Tensor) -> tuple[Record, torch.Tensor]:
        """Self-attention and last features (1, channels, h, w) under the source prompt."""
        record = Record(frozenset(), self_layers)
        predict(unet, latents, t, source, record)
        return record, features["features"]

    latents = trajectory[:1]
    with attention_control(unet), last_features(unet) as features:
        for i, t in enumerate(scheduler.timesteps):
            free, conditional = predict(unet, latents.expand(2, -1, -1, -1), t, both).split(1)
            cfg = guidance_scale * (conditional - free)
            noise = free + cfg
            inverted = trajectory[i : i + 1]
            # Of equal latents both energies are zero, and rescaling would make a direction of their rounding errors.
            if i < round(guided_steps * steps) and not torch.equal(latents, inverted):
                kept, kept_features = source_pass(inverted)
                with torch.enable_grad():
                    leaf = latents.detach().requires_grad_()
                    own, own_features = source_pass(leaf)
                    energy = self_attention_weight * self_attention_energy(own, kept)
                    energy = energy + feature_weight * feature_energy(own_features, kept_features)
                noise = noise + rescale(gradient(energy, leaf, unet.dtype), cfg, ratio)
            latents = scheduler.step(noise, t, latents).prev_sample
    return pipe.decode(latents, "pil")[0][0]


METHODS = {
    "guide_and_rescale": Method(
        run,
        "prompt",
        "Guide-and-Rescale (Titov et al., ECCV 2024), local-edit configuration, but the guiders at"
        " most as strong as classifier-free guidance (there: 3 times) and a guidance scale tuned here",
        {
            "guidance_scale": 2.5,
            "self_attention_weight": 3e5,
            "feature_weight": 500.0,
            "guided_steps": 0.6,
            "ratio": (0.33, 1.0),
        },
        {
            "guidance_scale": (2.5, 4.0, 7.5),
            "self_attention_weight": (1e5, 3e5, 1e6),
            "feature_weight": (0.0, 150.0, 500.0),
            "guided_steps": (0.4, 0.6, 0.8),
            "ratio": ((0.2, 0.5), (0.33, 1.0), (0.33, 3.0)),
        },
    )
}
