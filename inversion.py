# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""From a picture's latents to something that can be edited: DDIM inversion and the null-text optimization after it.

The functions compute and return; [`Inversion`] is the value that carries their result to any number of edits, in memory
or on disk. The scheduler owns the steps: nothing here knows a formula of the diffusion.
"""

import json
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace

import torch
import torch.nn.functional as F
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .attention_processors import Record, compute_dtype, gradient, predict
from .checks import check_setting, check_text
from .conditioning import Conditioning


INVERSION_METHODS = ("null_text", "negative_prompt", "direct")

# Families of models, by the tag that their inversions have: what they are called, and the class that edits with them.
FAMILIES = {"sd": ("Stable Diffusion 1.x/2.x", "MDEEditPipeline"), "sdxl": ("SDXL", "MDEEditXLPipeline")}

# Of a prediction's norm, by the U-Net's dtype. Measured on emoji_ldm: rounding 3e-7, 5e-4 and 4e-3, weights moved by a
# thousandth 1.3e-3, a LoRA at 0.9 of its strength 2e-3; fp32 leaves room for TF32.
FINGERPRINT_TOLERANCE = {"torch.float32": 5e-4, "torch.float16": 5e-3, "torch.bfloat16": 2e-2}


# What a LoRA's strength can be multiplied by; a negative one takes its effect away.
LORA_SCALES = (-100.0, 100.0)


def guided_noise(
    null: torch.Tensor, cond: torch.Tensor, guidance_scale: float, guidance_rescale: float = 0.0
) -> torch.Tensor:
    """Classifier-free guidance, with the conditional prediction's spread as far as `guidance_rescale` says (arXiv
    2305.08891, Eq. 15-16, as diffusers computes it). (batch, channels, h, w) all."""
    noise = null + guidance_scale * (cond - null)
    return rescale_noise_cfg(noise, cond, guidance_rescale) if guidance_rescale > 0 else noise


@torch.no_grad()
def ddim_invert(
    unet, inverse_scheduler, latents: torch.Tensor, conditioning: Conditioning, progress, lora_scale: float = 1.0
) -> torch.Tensor:
    """DDIM inversion at guidance 1: one conditional pass per step.

    Args:
        inverse_scheduler: a `DDIMInverseScheduler` with its timesteps set.
        latents: (1, channels, h, w) fp32, z_0.
        conditioning: of one row, the source prompt.
        progress: a tqdm bar, advanced by one per step.
        lora_scale: see [`predict`].

    Returns:
        (steps + 1, channels, h, w) fp32: z_T first, z_0 last, the order in which sampling visits them.
    """
    trajectory = [latents]
    for t in inverse_scheduler.timesteps:
        noise = predict(unet, latents, t, conditioning, lora_scale=lora_scale)
        latents = inverse_scheduler.step(noise, t, latents).prev_sample
        trajectory.append(latents)
        progress.update()
    return torch.cat(trajectory[::-1])


@torch.no_grad()
def sample_source(
    unet, scheduler, latents: torch.Tensor, conditioning: Conditioning, progress, lora_scale: float = 1.0
) -> torch.Tensor:
    """DDIM sampling at guidance 1: where the source prompt leads from z_T when it is its own negative prompt
    (negative-prompt inversion, arXiv 2305.16807, Eq. 6: the guidance term vanishes for the source).

    Returns:
        (steps + 1, channels, h, w) fp32, z_T first.
    """
    trajectory = [latents]
    for t in scheduler.timesteps:
        noise = predict(unet, latents, t, conditioning, lora_scale=lora_scale)
        latents = scheduler.step(noise, t, latents).prev_sample
        trajectory.append(latents)
        progress.update()
    return torch.cat(trajectory)


def optimize_null_embeds(
    unet,
    scheduler,
    trajectory: torch.Tensor,
    conditioning: Conditioning,
    empty: Conditioning,
    guidance_scale: float,
    num_inner_steps: int,
    early_stop_epsilon: float,
    progress,
    guidance_rescale: float = 0.0,
    lora_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Null-text optimization (arXiv 2212.09794, Algorithm 1): per step, the "empty prompt" under which guided sampling
    retraces the inversion.

    As in the reference: Adam, learning rate 1e-2 falling linearly to half of it, at most `num_inner_steps` updates,
    stopping after the one whose loss was below a threshold that grows with the step; the embedding is carried on. The
    conditional prediction does not depend on the embedding and is computed once per step.

    Args:
        scheduler: a `DDIMScheduler` with its timesteps set.
        trajectory: (steps + 1, channels, h, w) fp32 from [`ddim_invert`].
        conditioning, empty: of one row each, source prompt and empty prompt, of which only the embedding is
            optimized.
        early_stop_epsilon: threshold at the first step, on the latents' mean squared error.
        guidance_rescale, lora_scale: see [`guided_noise`] and [`predict`].

    Returns:
        latents (steps + 1, channels, h, w) that guided sampling visits, null embeddings (steps, tokens, dim) fp32, and
        how many inner updates each step took.
    """
    num_steps, dtype = len(scheduler.timesteps), compute_dtype(unet)
    latents, null = trajectory[:1], empty.embeds.float()
    visited, nulls, inner_steps = [latents], [], []

    def predict_null():
        return predict(unet, latents, t, replace(empty, embeds=null), lora_scale=lora_scale)

    def cfg_step(null_prediction, cond_prediction, t):
        noise = guided_noise(null_prediction, cond_prediction, guidance_scale, guidance_rescale)
        return scheduler.step(noise, t, latents).prev_sample

    for i, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            cond = predict(unet, latents, t, conditioning, lora_scale=lora_scale)
        null = null.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([null], lr=1e-2 * (1 - i / (2 * num_steps)))
        target, count = trajectory[i + 1 : i + 2], 0
        while count < num_inner_steps:
            with torch.enable_grad():
                previous = cfg_step(predict_null(), cond, t)
                loss = F.mse_loss(previous, target)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"The null-text optimization diverged at step {i} (loss {loss.item()}). Load the U-Net in float32"
                    " or bfloat16, lower `guidance_scale`, or use method='direct', which optimizes nothing."
                )
            null.grad = gradient(loss, null, dtype)
            optimizer.step()
            count += 1
            if loss.item() < early_stop_epsilon * (1 + 100 * i / num_steps):
                break
        null = null.detach()
        with torch.no_grad():
            latents = cfg_step(predict_null(), cond, t)
        visited.append(latents)
        nulls.append(null)
        inner_steps.append(count)
        progress.update()
        progress.set_postfix(mse=f"{F.mse_loss(latents, target).item():.1e}", inner=count)
    return torch.cat(visited), torch.cat(nulls), inner_steps


def invert_latents(
    unet,
    scheduler,
    inverse_scheduler,
    latents: torch.Tensor,
    conditioning: Conditioning,
    empty: Conditioning,
    method: str,
    guidance_scale: float,
    num_inner_steps: int,
    early_stop_epsilon: float,
    progress,
    guidance_rescale: float = 0.0,
    lora_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The source branch z_T ... z_0 of a picture by one of `INVERSION_METHODS`, and the null embeddings to go with it.

    Args:
        scheduler, inverse_scheduler: a `DDIMScheduler` and its `DDIMInverseScheduler`, timesteps set.
        latents: (1, channels, h, w) fp32, the picture's z_0.
        conditioning, empty: of one row each, source prompt and empty prompt.
        method, guidance_scale, num_inner_steps, early_stop_epsilon, guidance_rescale: see [`MDEEditPipeline.invert`].
        progress: a tqdm bar, advanced by one per step, and by one more where `method` samples the source branch.
        lora_scale: see [`predict`].

    Returns:
        (steps + 1, channels, h, w) fp32, z_T first; (steps, tokens, dim) fp32, or (1, tokens, dim) if all are the
        same; the pooled embedding beside them, (1, pooled dim) fp32 or `None`.

    Raises:
        FloatingPointError: the latents, or the optimization, left the finite numbers.
    """
    trajectory = ddim_invert(unet, inverse_scheduler, latents, conditioning, progress, lora_scale)
    if not torch.isfinite(trajectory).all():
        raise FloatingPointError(
            f"DDIM inversion left the finite numbers with a U-Net in {unet.dtype}: load it in float32 or bfloat16."
        )
    if method == "null_text":
        trajectory, null_embeds, _ = optimize_null_embeds(
            unet,
            scheduler,
            trajectory,
            conditioning,
            empty,
            guidance_scale,
            num_inner_steps,
            early_stop_epsilon,
            progress,
            guidance_rescale,
            lora_scale,
        )
    elif method == "negative_prompt":
        trajectory = sample_source(unet, scheduler, trajectory[:1], conditioning, progress, lora_scale)
        empty, null_embeds = conditioning, conditioning.embeds.float()
    else:
        null_embeds = empty.embeds.float()
    return trajectory.contiguous(), null_embeds, None if empty.pooled is None else empty.pooled.float()


def probe_noise(channels: int, num_levels: int) -> torch.Tensor:
    """The same small noise everywhere, (1, channels, side, side) fp32 on the CPU. What a model of `num_levels`
    resolutions answers to it tells it from others, however its weights are stored: the coarsest level has 2x2 cells,
    the fewest on which every weight of a 3x3 convolution counts."""
    side = 2**num_levels
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(1, channels, side, side, generator=generator, device="cpu")


@torch.no_grad()
def model_fingerprint(unet, scheduler, conditioning: Conditioning, lora_scale: float = 1.0) -> torch.Tensor:
    """What the model predicts for [`probe_noise`] in the middle of the noise schedule: the same for weights that are
    fused, offloaded or held in another dtype, another with another LoRA, strength or text encoder. Inside
    [`attention_control`].

    Args:
        conditioning: of one row, the source prompt.
        lora_scale: see [`predict`].

    Returns:
        (1, channels, side, side) fp32, on the CPU.

    Raises:
        ValueError: layers under control predict something else than the layers' own processors, or without a gradient.
        FloatingPointError: the prediction is not finite.
    """
    noise = probe_noise(unet.config.in_channels, len(unet.config.block_out_channels)).to(conditioning.embeds.device)
    timestep = torch.tensor(scheduler.config.num_train_timesteps // 2, device=noise.device)
    everywhere = frozenset(unet.attn_processors)
    record = Record(everywhere, everywhere)
    own = predict(unet, noise, timestep, conditioning, lora_scale=lora_scale)
    with torch.enable_grad():
        controlled = predict(unet, noise.requires_grad_(), timestep, conditioning, record, lora_scale)
        spread = sum(maps.square().sum() for maps in record.cross.values())
    if not torch.isfinite(own).all():
        raise FloatingPointError(
            f"A U-Net in {unet.dtype} predicts numbers that are not finite: load it in float32 or bfloat16."
        )
    # not the tolerance of rounding: where activations are quantized, rounding decides by whole steps
    if (controlled - own).norm() > 0.1 * own.norm():
        originals = (getattr(processor, "original", processor) for processor in unet.attn_processors.values())
        names = ", ".join(sorted({type(processor).__name__ for processor in originals}))
        raise ValueError(
            f"The U-Net's attention processors ({names}) do more than attend, and an edit replaces them in the layers"
            " that it steers: put plain ones in, as with `pipe.unet.set_attn_processor(AttnProcessor2_0())`."
        )
    slope = torch.autograd.grad(spread, noise, allow_unused=True)[0] if spread.requires_grad else None
    if slope is None or not slope.any():
        raise ValueError(
            "No gradient runs through this U-Net's attention, which the losses need: where activations are quantized,"
            " quantize the weights alone."
        )
    return own.cpu()


@dataclass(frozen=True, eq=False)  # a value of tensors has no one truth value of its equality
class Inversion:
    """A picture, inverted: everything an edit of it needs. Made by `pipe.invert`, used by any number of `pipe` calls.

    Attributes:
        latents: (steps + 1, channels, h, w) fp32, the source branch z_T ... z_0, in sampling order.
        null_embeds: (steps, tokens, dim) fp32, the unconditional embedding of each step; (1, tokens, dim) if it is the
            same for all.
        prompt: the source prompt p.
        method: how it was made, one of "null_text", "negative_prompt", "direct".
        guidance_scale: the scale it was made with. Null-text embeddings hold for this scale only; for the other methods
            it is just the edit's default.
        timesteps: (steps,) int64, descending.
        alphas_cumprod: (steps,) fp32, the scheduler's noise levels at `timesteps`.
        prediction_type: what the U-Net predicts ("epsilon", "v_prediction").
        fingerprint: (1, channels, side, side) fp32, what the model did, see [`model_fingerprint`].
        model_dtype: the U-Net's dtype, as text.
        image_size: (height, width) of the picture before it was resized, whose proportions a mask may have.
        negative_prompt: what the null embeddings are of ("direct") or started from ("null_text"); `None` if they were
            given as embeddings, with "negative_prompt" are the source prompt's, or are SDXL's zeros for no prompt.
        prompt_embeds: (1, tokens, dim), the source prompt's embedding if the user made it; `None`: the text encoder's.
        guidance_rescale: what guidance was rescaled by; null-text embeddings hold for it alone, too.
        clip_skip: how many of the text encoder's last layers were not used; edits leave out as many.
        lora_scale: what the adapters' strengths were multiplied by, here and in edits.
        family: of the model, one of `FAMILIES`. What follows is SDXL's, and `None` in others.
        pooled_null_embeds: (1, pooled dim) fp32, beside the null embeddings of all steps.
        pooled_prompt_embeds: (1, pooled dim), beside `prompt_embeds`.
        time_ids: (1, 6) fp32, the picture's size, crop and size in the model, see [`Conditioning`]; edits' too.
    """

    latents: torch.Tensor
    null_embeds: torch.Tensor
    prompt: str
    method: str
    guidance_scale: float
    timesteps: torch.Tensor
    alphas_cumprod: torch.Tensor
    prediction_type: str
    fingerprint: torch.Tensor
    model_dtype: str
    image_size: tuple[int, int] | None = None
    negative_prompt: str | None = ""
    prompt_embeds: torch.Tensor | None = None
    guidance_rescale: float = 0.0
    clip_skip: int | None = None
    lora_scale: float = 1.0
    family: str = "sd"
    pooled_null_embeds: torch.Tensor | None = None
    pooled_prompt_embeds: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    def __post_init__(self):
        object.__setattr__(self, "_decoded", {})  # see `decoded`; not a field, so neither saved nor compared

    @classmethod
    def adopt(cls, other) -> "Inversion":
        """An inversion of another copy of this code, which may be older and lack what has a default here, as this
        class's; one of this class as it is.

        Raises:
            TypeError: it lacks what has none.
        """
        if isinstance(other, cls):
            return other
        own = cls(**{f.name: getattr(other, f.name) for f in fields(cls) if hasattr(other, f.name)})
        object.__setattr__(own, "_decoded", getattr(other, "_decoded", own._decoded))
        return own

    @property
    def num_inference_steps(self) -> int:
        return len(self.timesteps)

    def source_latents(self, i: int) -> torch.Tensor:
        """The source branch before step `i`, (1, channels, h, w): z_T for 0, z_0 for `num_inference_steps`."""
        return self.latents[i : i + 1]

    def decoded(self, decoder: tuple, decode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`decode(z_0)`, (1, 3, height, width), computed once for all edits with the same `decoder`.

        Args:
            decoder: tells one decoder, with its settings and weights, from another.
        """
        if decoder not in self._decoded:
            self._decoded.clear()  # one picture, not one per decoder that was ever tried
            self._decoded[decoder] = decode(self.source_latents(self.num_inference_steps))
        return self._decoded[decoder]

    def null_embed(self, i: int) -> torch.Tensor:
        """The unconditional embedding of step `i`, (1, tokens, dim)."""
        i = min(i, len(self.null_embeds) - 1)
        return self.null_embeds[i : i + 1]

    def null(self, i: int) -> Conditioning:
        """The unconditional row of step `i`."""
        return Conditioning(self.null_embed(i), self.pooled_null_embeds, self.time_ids)

    def to(self, device) -> "Inversion":
        """The same inversion with the tensors an edit computes with on `device`."""
        names = ("latents", "null_embeds", "prompt_embeds", "pooled_null_embeds", "pooled_prompt_embeds", "time_ids")
        values = {name: getattr(self, name) for name in names}
        moved = replace(self, **{name: value if value is None else value.to(device) for name, value in values.items()})
        object.__setattr__(moved, "_decoded", self._decoded)
        return moved

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file: the tensors, and the rest as metadata."""
        tensors, metadata = {}, {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, torch.Tensor):
                tensors[f.name] = value.detach().cpu().contiguous().clone()  # two may be one and the same
            else:
                metadata[f.name] = json.dumps(value)
        save_file(tensors, path, metadata={"format": "mde_edit.inversion", **metadata})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Inversion":
        """Read what [`~Inversion.save`] wrote.

        Raises:
            ValueError: another file, or a damaged one. OSError: no such file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                found = set(file.keys()) | set(metadata)
                names = {f.name for f in fields(cls) if f.default is MISSING or f.name in found}
                if metadata.get("format") != "mde_edit.inversion" or names - found:
                    raise ValueError("it is another kind of file")
                values = {n: file.get_tensor(n) if n in file.keys() else json.loads(metadata[n]) for n in names}
            if values.get("image_size") is not None:
                values["image_size"] = tuple(values["image_size"])
            inversion = cls(**values)
            inversion.check_whole()
        except (SafetensorError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{os.fspath(path)!r} is not an inversion, or a damaged one ({error}): make one with"
                " `pipe.invert(...).save(path)`."
            ) from error
        return inversion

    def check_whole(self) -> None:
        """Raise `ValueError` where the parts do not fit each other, as in a file that was cut or changed."""
        steps = len(self.timesteps) if isinstance(self.timesteps, torch.Tensor) and self.timesteps.ndim == 1 else 0
        shapes = {
            "latents": (self.latents, 4, (steps + 1,)),
            "null_embeds": (self.null_embeds, 3, (1, steps)),
            "timesteps": (self.timesteps, 1, (max(steps, 1),)),
            "alphas_cumprod": (self.alphas_cumprod, 1, (steps,)),
        }
        check_setting("family", self.family, str, choices=tuple(FAMILIES))
        beside = {"pooled_null_embeds": self.pooled_null_embeds, "time_ids": self.time_ids}
        if self.prompt_embeds is not None:
            shapes["prompt_embeds"] = (self.prompt_embeds, 3, (1,))
            beside["pooled_prompt_embeds"] = self.pooled_prompt_embeds
        if self.family == "sdxl":
            shapes |= {name: (tensor, 2, (1,)) for name, tensor in beside.items()}
        elif any(tensor is not None for tensor in beside.values()):
            raise ValueError(f"its {', '.join(beside)} are another family's")
        for name, (tensor, axes, lengths) in shapes.items():
            if not isinstance(tensor, torch.Tensor) or tensor.ndim != axes or 0 in tensor.shape:
                raise ValueError(f"its {name} are no tensor of {axes} axes")
            if len(tensor) not in lengths:
                raise ValueError(f"its {name} are {len(tensor)} for {steps} steps")
            if tensor.is_complex() or not torch.isfinite(tensor).all():
                raise ValueError(f"its {name} are not finite numbers")
        if self.time_ids is not None and self.time_ids.shape[1] != 6:
            raise ValueError(f"its time_ids are {self.time_ids.shape[1]}, not a picture's six")
        if self.timesteps.is_floating_point() or self.timesteps.min() < 0:
            raise ValueError("its timesteps are not whole numbers from 0")
        if not isinstance(self.fingerprint, torch.Tensor) or self.fingerprint.ndim != 4:
            raise ValueError("its fingerprint is of an older kind, or none")
        check_setting("method", self.method, str, choices=INVERSION_METHODS)
        check_setting("guidance_scale", self.guidance_scale, float, 1)
        check_setting("guidance_rescale", self.guidance_rescale, float, 0, 1)
        check_setting("clip_skip", self.clip_skip, int | None, 1)
        check_setting("lora_scale", self.lora_scale, float, *LORA_SCALES)
        check_text("prompt", self.prompt)
        texts = (self.prediction_type, self.model_dtype, self.negative_prompt or "")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("its prediction type, dtype or negative prompt is no text")
        size = self.image_size
        if size is not None and not (len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)):
            raise ValueError(f"its image size is {size!r}")

    def check_schedule(self, scheduler) -> None:
        """Raise `ValueError` unless this inversion was made with the noise schedule of `scheduler`, a `DDIMScheduler`
        with its timesteps set for this many steps."""
        if (
            scheduler.config.prediction_type != self.prediction_type
            or not torch.equal(scheduler.timesteps.cpu(), self.timesteps.cpu())
            or not torch.allclose(scheduler.alphas_cumprod.cpu()[self.timesteps.cpu()], self.alphas_cumprod.cpu())
        ):
            raise ValueError(
                "The inversion was made with another noise schedule (timesteps, betas or prediction type). Give the"
                " pipeline the scheduler it had then, or call `pipe.invert` again."
            )

    def check_model(self, fingerprint: torch.Tensor, model_dtype: str) -> None:
        """Raise `ValueError` unless this inversion was made with a model that does what the one at hand does, of
        which [`model_fingerprint`] and the dtype are given."""
        tolerance = max(FINGERPRINT_TOLERANCE.get(dtype, 2e-2) for dtype in (model_dtype, self.model_dtype))
        fits = fingerprint.shape == self.fingerprint.shape
        if not (fits and (fingerprint - self.fingerprint).norm() <= tolerance * self.fingerprint.norm()):
            raise ValueError(
                "The inversion was made with another model, or another LoRA, adapter strength, text encoder or FreeU"
                " setting: its latents mean nothing here. Call `pipe.invert` again with the pipeline that edits."
            )


def check_inversion_settings(
    method: str,
    num_inference_steps: int,
    guidance_scale: float,
    num_train_timesteps: int,
    num_inner_steps: int = 10,
    early_stop_epsilon: float = 1e-5,
    guidance_rescale: float = 0.0,
) -> None:
    """Raise `ValueError` for settings no inversion can be made with, saying which and what would do."""
    check_setting("method", method, str, choices=INVERSION_METHODS)
    check_setting("num_inference_steps", num_inference_steps, int, 1, num_train_timesteps)
    if check_setting("guidance_scale", guidance_scale, float, 1) == 1 and method == "null_text":
        raise ValueError(
            f"method='null_text' needs `guidance_scale` > 1, not {guidance_scale!r}: without guidance there is no null"
            " embedding to optimize. Use method='direct'."
        )
    check_setting("num_inner_steps", num_inner_steps, int, 1)
    check_setting("early_stop_epsilon", early_stop_epsilon, float, 0)
    check_setting("guidance_rescale", guidance_rescale, float, 0, 1)
