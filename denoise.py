# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""One step of the paper, z*_t -> z*_{t-1}, as functions: what is recorded, injected, guided and blended (Eq. 2-8).

[`Settings`] says how, [`Edit`] what, [`Run`] holds what every step needs; [`record_source`] and [`edit_step`] are the
step, [`guide_latents`] its gradient descent. Target prompts of one picture share passes of the U-Net, a row each.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import compress
from typing import Any, NamedTuple

import torch

from .attention_processors import (
    AttentionLayer,
    Inject,
    Record,
    align_maps,
    compute_dtype,
    gradient,
    own_maps,
    predict,
    stack_maps,
)
from .checks import check_setting
from .conditioning import Conditioning, join_conditioning
from .inversion import Inversion, guided_noise
from .losses import aggregate_maps, color_consistency_loss, object_alignment_loss, spatial_ratio_loss, word_map
from .prompts import TokenAlignment, WordKey


CCL_FORMS = ("token_ratio", "spatial_ratio", "both")
_LITERAL = {"optimization_iterations": 15, "optimization_threshold": 1.0, "max_update": None}
# Named settings of an edit: `pipe(prompt, inversion, object_masks=..., **pipe.presets["paper"])`.
PRESETS: dict[str, dict[str, Any]] = {
    # The paper's text: Eq. 6 alone, lambda_2 = 1.25, 15 iterations for every word, no trust cap.
    "paper": {"oal_weight": 1.0, "ccl_form": "token_ratio", "ccl_weight": 1.25, **_LITERAL},
    # What the official code computes: an object loss without gradient, the spatial ratio at its hard-coded weight.
    "released": {"oal_weight": 0.0, "ccl_form": "spatial_ratio", "ccl_weight": 1.5, **_LITERAL},
    # Every word in small steps, which cost no edit either where the model looks in the right places by itself.
    "gentle": {"ccl_weight": 0.3, "max_update": 0.02, "optimization_threshold": 1.0},
    # With 15 steps of a "direct" inversion: as many edits as the defaults make in 50, within the interval (RESULTS.md).
    "fast": {"optimization_iterations": 1},
}


# ---------------------------------------------------------------------------------------------------------------------
# What an edit is made of
# ---------------------------------------------------------------------------------------------------------------------


def _setting(default, low: float | None = None, high: float | None = None, choices: Sequence[str] = ()):
    return field(default=default, metadata={"low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """How an edit is made: the settings of [`MDEEditPipeline.__call__`], which documents them, with default and range.

    Raises:
        ValueError: a value of another type or out of its range; names the setting and says what it can be.
    """

    cross_replace_steps: float = _setting(0.8, 0, 1)
    self_replace_steps: float = _setting(0.5, 0, 1)
    oal_weight: float = _setting(1.0, 0)
    ccl_weight: float = _setting(1.25, 0)
    ccl_form: str = _setting("both", choices=CCL_FORMS)
    optimization_steps: float = _setting(0.4, 0, 1)
    optimization_iterations: int = _setting(5, 0)
    optimization_threshold: float = _setting(0.6, 0, 1)
    step_size: float = _setting(1.0, 0)
    max_update: float | None = _setting(0.05, 0)
    outside_attention: float = _setting(1.0, 0, 1)
    attention_resolution: int | None = _setting(None, 1)
    mask_dilation: int | None = _setting(None, 0)
    background_blend: float = _setting(0.3, 0, 1)
    eta: float = _setting(0.0, 0, 1)

    def __post_init__(self):
        for setting in fields(self):
            value = check_setting(setting.name, getattr(self, setting.name), setting.type, **setting.metadata)
            object.__setattr__(self, setting.name, value)


class Region(NamedTuple):
    """An edited word and where it belongs.

    key: how the user named it. token_indices: its tokens in the target prompt.
    mask: (pixels,) its mask S at the loss level, in the form that its loss reads: an object's as covered share, an
    attribute's in {0, 1}.
    shares: (h, w) of a cross-attention layer -> (pixels,), the covered share of its pixels.
    """

    key: WordKey
    token_indices: tuple[int, ...]
    mask: torch.Tensor
    shares: dict[tuple[int, int], torch.Tensor]


@dataclass(frozen=True)
class Edit:
    """One target prompt, ready for the loop.

    conditioning: of one row. alignment: with the source prompt, edited words counted as new.
    objects, attributes: the regions of OAL and CCL. mask: (1, 1, h, w) bool, M of Eq. 7-8, or None without masks (then
    there is nothing to hold the edit to). generator: of the noise that `eta` adds. null: of the edit's own negative
    prompt; without one, the inversion's.
    """

    conditioning: Conditioning
    alignment: TokenAlignment
    objects: Sequence[Region]
    attributes: Sequence[Region]
    mask: torch.Tensor | None
    generator: torch.Generator | None = None
    null: Conditioning | None = None


@dataclass(frozen=True)
class Run:
    """What all steps and all target prompts of one picture share, and which mechanism acts at which step.

    scheduler: a `DDIMScheduler`, timesteps set. inversion: on the U-Net's device. source_conditioning: of one
    row, the source prompt. guidance_rescale: see [`guided_noise`]. layers: all of the U-Net's attention layers;
    loss_layers: those the losses read. capture_maps: whether [`Step.maps`] is asked for. edits_per_pass: how many
    target prompts share a pass at most.
    """

    unet: torch.nn.Module
    scheduler: Any
    inversion: Inversion
    source_conditioning: Conditioning
    guidance_scale: float
    settings: Settings
    layers: Sequence[AttentionLayer]
    loss_layers: Sequence[AttentionLayer]
    capture_maps: bool = False
    guidance_rescale: float = 0.0
    edits_per_pass: int = 1

    def steps(self, share: float) -> int:
        """A share of the steps as their number."""
        return round(share * self.inversion.num_inference_steps)

    def null(self, i: int, edit: Edit) -> Conditioning:
        """The unconditional row of step `i`."""
        null = self.inversion.null(i) if edit.null is None else edit.null
        return null.to(edit.conditioning.embeds)

    def timestep(self, i: int) -> int:
        """Of step `i`, as a number: the scheduler has it on the device, which reading it would have to wait for."""
        return int(self.inversion.timesteps[i])

    def injects_cross(self, i: int) -> bool:
        return i < self.steps(self.settings.cross_replace_steps)

    def injects_self(self, i: int) -> bool:
        return i < self.steps(self.settings.self_replace_steps)

    def optimizes(self, i: int) -> bool:
        return i < self.steps(self.settings.optimization_steps)

    def blends(self, i: int) -> bool:
        return i >= self.inversion.num_inference_steps - self.steps(self.settings.background_blend)

    def has_losses(self, edit: Edit) -> bool:
        weighted = (edit.objects and self.settings.oal_weight) or (edit.attributes and self.settings.ccl_weight)
        return bool(weighted) and self.settings.optimization_iterations > 0

    def reads_source(self, edit: Edit) -> bool:
        """Whether Eq. 6 needs the source's maps at every guided step, inside the injection window or not."""
        return bool(edit.attributes and self.settings.ccl_weight) and self.settings.ccl_form != "spatial_ratio"


class Step(NamedTuple):
    """What [`edit_step`] gives back of each edit.

    latents: (1, channels, h, w) fp32, z*_{t-1}. losses: an entry per iteration of the latent guidance.
    maps: of the edited words, {key: (2, h, w)}, aggregated (Eq. 4) before and after the latent guidance; empty unless
    the run captures maps and this step is one that optimizes.
    """

    latents: torch.Tensor
    losses: list[dict[str, float]]
    maps: dict[WordKey, torch.Tensor]


# ---------------------------------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------------------------------


def record_source(run: Run, i: int, t: torch.Tensor, edits: Sequence[Edit]) -> Record:
    """Eq. 2 for the source prompt: one pass records what this step's injection and losses read; none if nothing does.

    Self-attention is recorded in the layers of at most half the latents' resolution.
    """
    cross_layers, self_layers = (), ()
    if run.injects_cross(i):
        cross_layers = [layer for layer in run.layers if layer.is_cross]
    elif run.optimizes(i) and any(run.reads_source(edit) for edit in edits):
        cross_layers = run.loss_layers
    if run.injects_self(i):
        h, w = run.inversion.latents.shape[-2:]
        half = ((h + 1) // 2) * ((w + 1) // 2)
        self_layers = [layer for layer in run.layers if not layer.is_cross and layer.pixels <= half]
    record = Record(*(frozenset(layer.name for layer in layers) for layers in (cross_layers, self_layers)))
    if cross_layers or self_layers:
        latents = run.inversion.source_latents(i)
        predict(run.unet, latents, t, run.source_conditioning, record, run.inversion.lora_scale)
    return record


def picture_step(run: Run, i: int, t: torch.Tensor, latents: torch.Tensor, edits: Sequence[Edit]) -> list[Step]:
    """One step of all target prompts of a picture; `latents` (edits, channels, h, w) fp32."""
    return edit_steps(run, i, t, latents, edits, record_source(run, i, t, edits))


def edit_steps(
    run: Run, i: int, t: torch.Tensor, latents: torch.Tensor, edits: Sequence[Edit], source: Record
) -> list[Step]:
    """[`edit_step`] of all target prompts of a picture, so many at a time as the run says; `latents` (edits, channels,
    h, w) fp32."""
    n = run.edits_per_pass
    groups = (slice(k, k + n) for k in range(0, len(edits), n))
    return [step for group in groups for step in edit_step(run, i, t, latents[group], edits[group], source)]


def join_steps(
    i: int,
    done: Sequence[Step],
    losses: Sequence[list[dict[str, float]]],
    maps: Sequence[dict[WordKey, list[torch.Tensor]]],
) -> torch.Tensor:
    """The latents of all edits after step `i`, (edits, channels, h, w) fp32. What the steps report is added to `losses`
    and `maps`, which have one part per edit.

    Raises:
        FloatingPointError: the latents left the finite numbers.
    """
    latents = torch.cat([step.latents for step in done])
    if not torch.isfinite(latents).all():
        raise FloatingPointError(
            f"The latents left the finite numbers at step {i}. Lower `guidance_scale`, `step_size` or `max_update`, or"
            " load the U-Net in float32."
        )
    for k, step in enumerate(done):
        losses[k] += [{"step": i, **entry} for entry in step.losses]
        for key, pair in step.maps.items():
            maps[k].setdefault(key, []).append(pair)
    return latents


def edit_step(
    run: Run, i: int, t: torch.Tensor, latents: torch.Tensor, edits: Sequence[Edit], source: Record
) -> list[Step]:
    """One step of target prompts that share their passes, z*_t -> z*_{t-1}: a row of each pass per prompt.

    Args:
        latents: (edits, channels, h, w) fp32, z*_t.
        source: what [`record_source`] recorded at this step.
    """
    lora_scale, alignments = run.inversion.lora_scale, [edit.alignment for edit in edits]
    aligned = align_maps(source.cross, alignments)
    cross = aligned if run.injects_cross(i) else {}
    tokens = torch.stack([alignment.shared for alignment in alignments])
    inject = Inject(cross, tokens, source.self_qk, weights=own_weights(run, edits, cross))  # Eq. 3

    losses, before = [[] for _ in edits], {}
    if run.optimizes(i) and any(run.has_losses(edit) for edit in edits):  # Eq. 4-7
        reads = any(run.reads_source(edit) for edit in edits)
        shared = stack_maps(aligned, run.loss_layers).sum(dim=-1) if reads else [None] * len(edits)
        latents, losses, before = guide_latents(run, i, t, latents, edits, inject, shared)

    if run.capture_maps and run.optimizes(i):
        inject = replace(inject, capture_layers=frozenset(layer.name for layer in run.loss_layers))
    texts = [edit.conditioning for edit in edits]
    if run.guidance_scale > 1:  # classifier-free guidance
        both = join_conditioning([*(run.null(i, edit) for edit in edits), *texts])
        pair = predict(run.unet, latents.repeat(2, 1, 1, 1), t, both, inject, lora_scale)
        noise = guided_noise(*pair.chunk(2), run.guidance_scale, run.guidance_rescale)
    else:
        noise = predict(run.unet, latents, t, join_conditioning(texts), inject, lora_scale)

    after = stack_maps(inject.captured, run.loss_layers) if inject.captured else None
    steps = []
    for k, (edit, eps, z) in enumerate(zip(edits, noise.split(1), latents.split(1))):  # each has its own generator
        z = run.scheduler.step(eps, run.timestep(i), z, eta=run.settings.eta, generator=edit.generator).prev_sample
        if edit.mask is not None and run.blends(i):  # Eq. 8: outside M the picture is the source's
            z = torch.where(edit.mask, z, run.inversion.source_latents(i + 1))
        maps = {} if after is None else edited_maps(run, edit, before.get(k, after[k]), after[k])
        steps.append(Step(z, losses[k], maps))
    return steps


def own_weights(run: Run, edits: Sequence[Edit], injected: Collection[str]) -> dict[str, torch.Tensor]:
    """What the edited words' own maps are multiplied by in the layers where the source's are injected: 1 inside a
    word's mask, `outside_attention` outside it. (Eq. 3 keeps them everywhere; the paper's overview speaks of new maps
    "within masks".)

    Returns:
        {layer name: (edits, 1, pixels, tokens)}, empty where all of them would be 1.
    """
    outside = run.settings.outside_attention
    if outside == 1:
        return {}
    weights = {}
    for size in {layer.size for layer in run.layers if layer.name in injected}:
        inside = torch.stack([covered(edit, size) for edit in edits])
        weights[size] = (outside + (1 - outside) * inside)[:, None]
    return {layer.name: weights[layer.size] for layer in run.layers if layer.name in injected}


def covered(edit: Edit, size: tuple[int, int]) -> torch.Tensor:
    """(pixels, tokens) of a layer of this `size`: how much of each pixel the masks of each token's word cover; 1 for
    the tokens that are not edited."""
    shared, regions = edit.alignment.shared, (*edit.objects, *edit.attributes)
    inside = torch.ones(size[0] * size[1], len(shared), device=shared.device)
    for i in {i for region in regions for i in region.token_indices}:
        inside[:, i] = torch.stack([r.shares[size] for r in regions if i in r.token_indices]).amax(0)
    return inside


def guide_latents(
    run: Run,
    i: int,
    t: torch.Tensor,
    latents: torch.Tensor,
    edits: Sequence[Edit],
    inject: Inject,
    shared_attention: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor, list[list[dict[str, float]]], dict[int, torch.Tensor]]:
    """The latent guidance of one step: the latents move down lambda_1 OAL + lambda_2 CCL several times (Eq. 7-8,
    [`move_latents`]). The losses are those of the words that look past their masks before it ([`words_astray`]); where
    none does, an edit's latents stay and it takes part in no further iteration.

    Rows of a batch know nothing of each other, so that the gradient of the sum of all edits' losses is each edit's own.

    Args:
        latents: (edits, channels, h, w) fp32, z*.
        inject: what the targets' passes inject at this step.
        shared_attention: of each edit (heads, pixels), sum_j A_j of Eq. 6, where the losses read it.

    Returns:
        the moved latents (outside M bit-identical); of each edit its loss history; and, of the edits that have losses,
        {position: (heads, pixels, tokens)}, the maps before.

    Raises:
        FloatingPointError: loss or gradient left the finite numbers.
    """

    def together(some: dict[int, Edit]) -> tuple[Conditioning, Inject]:
        return join_conditioning([edit.conditioning for edit in some.values()]), inject.of(list(some))

    settings, sigma, dtype = run.settings, noise_level(run.scheduler, run.timestep(i)), compute_dtype(run.unet)
    rows, told = list(latents.split(1)), [[] for _ in edits]
    guided, first_maps = {k: edit for k, edit in enumerate(edits) if run.has_losses(edit)}, {}
    passing = together(guided)
    for _ in range(settings.optimization_iterations):
        with torch.enable_grad():
            z = torch.cat([rows[k] for k in guided]).requires_grad_()
            maps = own_maps(run.unet, z, t, *passing, run.loss_layers, run.inversion.lora_scale)
            maps = dict(zip(guided, maps))
            if not first_maps:
                first_maps = {k: own.detach() for k, own in maps.items()}
                guided = words_astray(first_maps, guided, run)
                if not guided:
                    break
            losses = {k: edit_losses(maps[k], shared_attention[k], edit, settings) for k, edit in guided.items()}
            total = torch.stack([own["loss"] for own in losses.values()]).sum()
            grads = dict(zip(maps, gradient(total, z, dtype).split(1)))
        for k, own in losses.items():
            rows[k], capped = move_latents(rows[k], grads[k], edits[k].mask, sigma, settings)
            finite = torch.isfinite(own["loss"]) & torch.isfinite(grads[k]).all()
            scalars = {"capped": capped, **own, "finite": finite}
            told[k].append({name: value.detach() for name, value in scalars.items()})
        if len(guided) < len(maps):
            passing = together(guided)
    histories = read_histories(told)
    bad = [entry for history in histories for entry in history if not entry.pop("finite")]
    if bad:
        raise FloatingPointError(
            f"The latent guidance left the finite numbers at timestep {run.timestep(i)}, iteration"
            f" {bad[0]['iteration']} (loss {bad[0]['loss']}). Lower `step_size` or `max_update`, or load the U-Net in"
            " float32."
        )
    return torch.cat(rows), histories, first_maps


def move_latents(
    latents: torch.Tensor, grad: torch.Tensor, mask: torch.Tensor, sigma: float, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 7-8, one update of one edit: z* <- z* - M * clamp(delta * grad(lambda_1 OAL + lambda_2 CCL), -c, c), with
    delta = step_size * sigma_t and c = max_update * rms(z* in M).

    The cap is element-wise: a global rescale would couple the regions, so that a large object gradient would shrink an
    attribute's step.

    Args:
        latents, grad: (1, channels, h, w) fp32. mask: (1, 1, h, w) bool, M. sigma: sigma_t, see [`noise_level`].

    Returns:
        the latents, and the share of their values in M that the cap cut, a scalar.
    """
    count = mask.sum() * latents.shape[1]  # of values in M
    update, capped = settings.step_size * sigma * grad, count.new_zeros(())
    if settings.max_update is not None:
        cap = settings.max_update * (latents.square() * mask).sum().div(count).sqrt()
        capped = ((update.abs() > cap) & mask).sum() / count
        update = update.clamp(-cap, cap)
    return torch.where(mask, latents - update, latents), capped


def words_astray(maps: dict[int, torch.Tensor], edits: dict[int, Edit], run: Run) -> dict[int, Edit]:
    """The `edits` with the regions alone of which at most `optimization_threshold` of the word's attention (Eq. 4) lies
    on pixels that the mask touches, and whose loss has a weight; without those that have none. At 1 these are all. A
    word that looks everywhere alike has a share as large as its mask.

    Args:
        maps: of each edit (heads, pixels, tokens), A* of the loss layers.
    """
    settings, size = run.settings, run.loss_layers[0].size
    if settings.optimization_threshold == 1:
        return edits
    weights = {"objects": settings.oal_weight, "attributes": settings.ccl_weight}
    kinds = [kind for kind, weight in weights.items() if weight]
    words = [(k, kind, region) for k, edit in edits.items() for kind in kinds for region in getattr(edit, kind)]
    shares = []
    for k, _, region in words:
        attention = aggregate_maps(maps[k], region.token_indices)  # (pixels,)
        shares.append((attention * (region.shares[size] > 0)).sum() / attention.sum())
    # The numbers that a step's guidance reads before it: a GPU is waited for once, not in every iteration.
    # "Not more", so that what is no number is guided, and found there.
    astray = (~(torch.stack(shares) > settings.optimization_threshold)).tolist()
    kept: dict[int, dict[str, list[Region]]] = {}
    for k, kind, region in compress(words, astray):
        kept.setdefault(k, {"objects": [], "attributes": []})[kind].append(region)
    return {k: replace(edits[k], **regions) for k, regions in kept.items()}


def read_histories(told: Sequence[Sequence[dict[str, torch.Tensor]]]) -> list[list[dict[str, float]]]:
    """The scalars of every edit's every iteration as numbers, read from the device at once."""
    scalars = [value.float() for own in told for entry in own for value in entry.values()]
    numbers = iter(torch.stack(scalars).tolist() if scalars else ())
    return [
        [{"iteration": k, **{name: next(numbers) for name in entry}} for k, entry in enumerate(own)] for own in told
    ]


def edit_losses(
    maps: torch.Tensor, shared_attention: torch.Tensor | None, edit: Edit, settings: Settings
) -> dict[str, torch.Tensor]:
    """The losses of one target prompt on its own maps, each only where it is asked for.

    Args:
        maps: (heads, pixels, tokens), A* of the loss layers.
        shared_attention: (heads, pixels), sum_j A_j of Eq. 6.

    Returns:
        scalars "oal" (Eq. 5, summed over objects), "ccl" (Eq. 6 or its alternatives, summed over attributes) and
        "loss", lambda_1 OAL + lambda_2 CCL (Eq. 7).
    """
    losses = {"loss": maps.new_zeros(())}
    if edit.objects and settings.oal_weight:
        attention = torch.stack([aggregate_maps(maps, r.token_indices) for r in edit.objects])  # (objects, pixels)
        losses["oal"] = object_alignment_loss(attention, torch.stack([r.mask for r in edit.objects]))
        losses["loss"] = losses["loss"] + settings.oal_weight * losses["oal"]
    if edit.attributes and settings.ccl_weight:
        terms = []
        for region in edit.attributes:
            attention = word_map(maps, region.token_indices)  # (heads, pixels)
            if settings.ccl_form != "spatial_ratio":
                terms.append(color_consistency_loss(attention, shared_attention, region.mask))
            if settings.ccl_form != "token_ratio":
                terms.append(spatial_ratio_loss(attention, region.mask))
        losses["ccl"] = torch.stack(terms).sum()
        losses["loss"] = losses["loss"] + settings.ccl_weight * losses["ccl"]
    return losses


def noise_level(scheduler, timestep: int) -> float:
    """sigma_t = sqrt((1 - alpha_bar) / alpha_bar), by which Eq. 7's step shrinks as the picture appears."""
    # Where z* has all noise and no picture (zero terminal SNR), sigma_t is infinite: the cap decides there.
    alpha_bar = max(scheduler.alphas_cumprod[timestep].item(), 1e-8)
    return ((1 - alpha_bar) / alpha_bar) ** 0.5


def edited_maps(run: Run, edit: Edit, before: torch.Tensor, after: torch.Tensor) -> dict[WordKey, torch.Tensor]:
    """[`Step.maps`] from the maps before and after the latent guidance, (heads, pixels, tokens) each."""
    size = run.loss_layers[0].size
    # by key: a word may be an object and an attribute at once
    words = {region.key: region.token_indices for region in (*edit.objects, *edit.attributes)}
    return {
        key: torch.stack([aggregate_maps(maps, indices) for maps in (before, after)]).reshape(2, *size).cpu()
        for key, indices in words.items()
    }
