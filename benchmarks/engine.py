"""What an edit costs at Stable Diffusion 1.4's size, 512x512, with random weights: FLOPs, seconds and peak memory of
ours, of the naive algorithm and of a plain sample, side by side.

    python -m benchmarks.engine --out bench_out/engine.md
    python -m benchmarks.engine --out bench_out/engine.md --dtype float32 bfloat16 float16     # on a GPU

A program (an edit, an inversion, a sample) is so many passes of each kind, [`passes_of`]; tests/test_engine.py asserts
on a small model that these are what runs. FLOPs (2 per multiply-add, of matrix products, convolutions and attention)
and peaks are counted on tensors without data, which dispatch the same operations as real ones. On a CPU each kind of
pass is timed, and its seconds multiplied; on a GPU the whole programs run, and what they hold is measured.

The baseline is the algorithm as tests/oracle.py writes it: every pass whole, every map materialized, the source run
again in every iteration, weights that ask for gradients, 15 iterations as in the paper. The official program also runs
the source's unconditional row. Ours is counted at its defaults, with every step's words guided, and with those 15.
"""

import argparse
import math
import os
import platform
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMInverseScheduler, DDIMScheduler, UNet2DConditionModel
from mde_edit.attention_processors import (
    Inject,
    align_maps,
    attention_control,
    attention_layers,
    compute_dtype,
    gradient,
    own_maps,
    predict,
    select_loss_layers,
    stack_maps,
)
from mde_edit.conditioning import Conditioning, join_conditioning
from mde_edit.denoise import PRESETS, Edit, Region, Run, Settings, edit_losses, picture_step, record_source
from mde_edit.inversion import Inversion, guided_noise, invert_latents
from mde_edit.prompts import TokenAlignment
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from tests.oracle import NaiveProcessor, Tape, naive_edit


TOKENS = 77  # of a prompt
NEW = (2, 5)  # those that the two prompts do not share: the object's and the attribute's
PROGRAMS = ("sample", "edit", "naive edit", "null_text", "naive null_text", "negative_prompt", "direct")
GUIDANCE_SCALE, INNER_STEPS = 7.5, 10
FAST_STEPS = 15  # of the inversion that the preset "fast" goes with
# As often as the paper guides.
AS_OFTEN = {name: PRESETS["paper"][name] for name in ("optimization_iterations", "optimization_threshold")}
LATENT_SIZE = (64, 64)
REPEATS = 3
TERA, GIB = 1e12, 2**30


# ---------------------------------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------------------------------


class _NoModules(nullcontext):
    """For torch's tracker of modules, whose hooks forbid the gradient of a leaf that a module is given."""

    parents = frozenset({"Global"})


def flop_counter() -> FlopCounterMode:
    """torch's counter, without its figures per module, and taught the CPU's fused attention."""
    aten = torch.ops.aten
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
            sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    counter.mod_tracker = _NoModules()
    return counter


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors that operations inside made and somebody still holds, and their `peak`: of activations,
    since weights were there before. What a kernel takes and gives back by itself is not seen."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in given | self.known.keys():
                storage = tensor.untyped_storage()
                self.known[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self._freed, id(storage))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self.known.pop(key)


# ---------------------------------------------------------------------------------------------------------------------
# A picture and an edit of it, without a pipeline around
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """A model with random weights, and an edit of an object and an attribute to run on it."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    run: Run
    edit: Edit

    @property
    def steps(self) -> int:
        return self.run.inversion.num_inference_steps

    @property
    def injected(self) -> set[str]:
        """Self-attention layers that take the source's maps: of at most half the latents' resolution."""
        h, w = self.run.inversion.latents.shape[-2:]
        half = ((h + 1) // 2) * ((w + 1) // 2)
        return {layer.name for layer in self.run.layers if not layer.is_cross and layer.pixels <= half}

    @property
    def null(self) -> Conditioning:
        """The empty prompt, one row."""
        return self.run.null(0, self.edit)

    def step(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The timestep and the source's latents (1, channels, h, w) of step `i`."""
        return self.run.inversion.timesteps[i], self.run.inversion.source_latents(i)


def make_vae(**config) -> AutoencoderKL:
    """The autoencoder that Stable Diffusion and SDXL have but for its `config`, with random weights."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        **config,
    )
    return vae.eval().requires_grad_(False)


def sd14() -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """Stable Diffusion 1.4's two large parts, with random weights."""
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return unet.eval(), make_vae(scaling_factor=0.18215, sample_size=512)


def sd_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def make_text(unet) -> Conditioning:
    """What a prompt would condition this U-Net by, with random numbers, one row."""
    config, device = unet.config, unet.device
    embeds = torch.randn(1, TOKENS, config.cross_attention_dim, device=device)
    if config.addition_embed_type is None:
        return Conditioning(embeds)
    sizes = torch.full((1, 6), 1024.0, device=device)
    pooled = config.projection_class_embeddings_input_dim - sizes.numel() * config.addition_time_embed_dim
    return Conditioning(embeds, torch.randn(1, pooled, device=device), sizes)


def make_scene(unet, vae, latent_size: tuple[int, int], steps: int = 50, **settings) -> Scene:
    """An edit of `steps` steps with `settings` on latents of `latent_size` (h, w), on the U-Net's device."""
    h, w = latent_size
    scheduler = sd_scheduler()
    scheduler.set_timesteps(steps)
    device, null = unet.device, make_text(unet)
    inversion = Inversion(
        latents=torch.randn(steps + 1, unet.config.in_channels, h, w, device=device),
        null_embeds=null.embeds,
        prompt="",
        method="direct",
        guidance_scale=GUIDANCE_SCALE,
        timesteps=scheduler.timesteps,
        alphas_cumprod=scheduler.alphas_cumprod[scheduler.timesteps],
        prediction_type="epsilon",
        fingerprint=torch.zeros(1, 4, 2, 2),
        model_dtype=str(unet.dtype),
        family="sd" if null.pooled is None else "sdxl",
        pooled_null_embeds=null.pooled,
        time_ids=null.time_ids,
    )
    layers = attention_layers(unet, latent_size)
    loss_layers = select_loss_layers(layers)
    run = Run(
        unet=unet,
        scheduler=scheduler,
        inversion=inversion,
        source_conditioning=make_text(unet),
        guidance_scale=GUIDANCE_SCALE,
        settings=Settings(**settings),
        layers=layers,
        loss_layers=loss_layers,
    )
    inside = torch.zeros(1, 1, h, w, dtype=torch.bool, device=device)
    inside[..., h // 4 : h // 2, w // 4 : w // 2] = True
    shares = {layer.size: F.interpolate(inside.float(), layer.size).flatten() for layer in layers}
    mask = shares[loss_layers[0].size]
    positions = torch.arange(TOKENS, device=device)
    edit = Edit(
        conditioning=make_text(unet),
        alignment=TokenAlignment(positions, (positions != NEW[0]) & (positions != NEW[1])),
        objects=[Region("object", (NEW[0],), mask, shares)],
        attributes=[Region("attribute", (NEW[1],), mask, shares)],
        mask=inside,
    )
    return Scene(unet, vae, run, edit)


# ---------------------------------------------------------------------------------------------------------------------
# Passes, one by one
# ---------------------------------------------------------------------------------------------------------------------


class Pass(NamedTuple):
    """A kind of pass; how much of the source's attention it injects or records, where it does."""

    name: str
    cross: bool = False
    self_: bool = False

    def __str__(self) -> str:
        injected = [kind for kind, there in (("cross", self.cross), ("self", self.self_)) if there]
        return self.name + (f" ({' + '.join(injected)})" if injected else "")


def passes_of(scene: Scene, program: str) -> Counter[Pass]:
    """How many passes of each kind a program makes: "sample", "naive edit", "edit", or an inversion."""
    n, run, edit = scene.steps, scene.run, scene.edit
    guided = run.steps(run.settings.optimization_steps) * run.settings.optimization_iterations
    if program == "edit":
        passes = Counter({Pass("decode"): 1})
        for i in range(n):
            kind = run.injects_cross(i), run.injects_self(i)
            if any(kind) or (run.optimizes(i) and run.reads_source(edit)):
                passes[Pass("source", *kind)] += 1
            if run.optimizes(i):
                passes[Pass("iteration", *kind)] += run.settings.optimization_iterations
            passes[Pass("pair", *kind)] += 1
        return passes
    return Counter(
        {
            "sample": {Pass("plain pair"): n, Pass("decode"): 1},
            "naive edit": {Pass("naive iteration"): guided, Pass("naive pass"): 3 * n, Pass("decode"): 1},
            "direct": {Pass("encode"): 1, Pass("plain pass"): n},
            "negative_prompt": {Pass("encode"): 1, Pass("plain pass"): 2 * n},
            "null_text": {Pass("encode"): 1, Pass("plain pass"): 3 * n, Pass("null iteration"): n * INNER_STEPS},
            "naive null_text": {
                Pass("encode"): 1,
                Pass("naive pass"): 2 * n,
                Pass("naive null iteration"): n * INNER_STEPS,
                Pass("naive pair"): n,
            },
        }[program]
    )


def state_of(scene: Scene, kind: Pass) -> int:
    """A step at which our edit makes a pass of this `kind`, or the first."""
    states = ((i, (scene.run.injects_cross(i), scene.run.injects_self(i))) for i in range(scene.steps))
    return next((i for i, state in states if state == (kind.cross, kind.self_)), 0)


def ready(scene: Scene, kind: Pass) -> Callable[[], object]:
    """A pass of this `kind` as a call, made inside [`controlled`]; what it finds when it starts is there."""
    run, edit, unet = scene.run, scene.edit, scene.unet
    i = state_of(scene, kind)
    t, latents = scene.step(i)
    cond, null = edit.conditioning, scene.null
    pair, both = latents.repeat(2, 1, 1, 1), join_conditioning([null, cond])

    def null_iteration(update):
        # (1 x tokens x dim): by the unconditional prediction's gradient, as the optimization of null embeddings does
        leaf = null.embeds.float().clone().requires_grad_()
        noise = predict(unet, latents, t, replace(null, embeds=leaf))
        update(F.mse_loss(noise, latents), leaf)

    if kind.name == "decode":
        return lambda: decode(scene, latents)
    if kind.name == "encode":
        pixels = torch.randn(1, 3, *(side * scale_of(scene.vae) for side in latents.shape[-2:]), device=latents.device)
        return lambda: scene.vae.encode(pixels.to(scene.vae.dtype)).latent_dist.mode()
    if kind.name in ("plain pass", "naive pass"):
        return lambda: predict(unet, latents, t, cond)
    if kind.name in ("plain pair", "naive pair"):
        return lambda: predict(unet, pair, t, both)
    if kind.name == "source":
        return lambda: record_source(run, i, t, [edit])
    if kind.name == "naive null iteration":
        return lambda: null_iteration(lambda loss, _: loss.backward())
    if kind.name == "null iteration":
        return lambda: null_iteration(lambda loss, leaf: gradient(loss, leaf, compute_dtype(unet)))
    if kind.name == "naive iteration":
        return lambda: naive_iteration(scene, t, latents)

    source = record_source(run, i, t, [edit])
    aligned = align_maps(source.cross, [edit.alignment])
    inject = Inject(aligned if kind.cross else {}, edit.alignment.shared[None], source.self_qk)
    if kind.name == "pair":
        return lambda: predict(unet, pair, t, both, inject)
    (shared,) = stack_maps(aligned, run.loss_layers).sum(dim=-1)

    def iteration():  # of `guide_latents`, without what it looks at and notes
        z = latents.clone().requires_grad_()
        (maps,) = own_maps(unet, z, t, cond, inject, run.loss_layers)
        return gradient(edit_losses(maps, shared, edit, run.settings)["loss"], z, compute_dtype(unet))

    return iteration


def naive_iteration(scene: Scene, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """One iteration as tests/oracle.py makes it: a source pass, whose graph is kept, a target pass and the gradient."""
    run, edit, tape = scene.run, scene.edit, tape_of(scene)
    tape.mode = "source"
    dtype = scene.unet.dtype
    kept = scene.unet(latents.to(dtype), t, **run.source_conditioning.to(dtype).unet_arguments())
    tape.mode = "target"
    z = latents.clone().requires_grad_()
    target = scene.unet(z.to(dtype), t, **edit.conditioning.to(dtype).unet_arguments())
    maps = stack_maps(tape.own, run.loss_layers)
    shared = (stack_maps(tape.source, run.loss_layers) * edit.alignment.shared).sum(dim=-1).detach()
    (grad,) = torch.autograd.grad(edit_losses(maps, shared, edit, run.settings)["loss"], z)
    del kept, target
    tape.mode = "plain"
    return grad


def tape_of(scene: Scene) -> Tape | None:
    """What the naive attention keeps, where it is in place."""
    return getattr(next(iter(scene.unet.attn_processors.values())), "tape", None)


def clear_tape(scene: Scene) -> None:
    tape = tape_of(scene)
    if tape is not None:
        tape.own.clear()
        tape.source.clear()


class controlled:
    """The U-Net as passes of a kind find it: under our attention control, with the naive attention and weights that ask
    for gradients, or as a plain sample has it."""

    def __init__(self, scene: Scene, kind: str):
        self.scene, self.naive, self.plain = scene, kind.startswith("naive"), kind.startswith("plain")

    def __enter__(self):
        unet = self.scene.unet
        self.before = dict(unet.attn_processors)
        if self.naive:
            tape = Tape()
            tape.alignment, tape.cross, tape.self_names = self.scene.edit.alignment, True, self.scene.injected
            unet.requires_grad_(True)
            unet.set_attn_processor({name: NaiveProcessor(name, tape) for name in self.before})
        else:
            unet.requires_grad_(False)
            self.control = nullcontext() if self.plain else attention_control(unet)
            self.control.__enter__()

    def __exit__(self, *_):
        if self.naive:
            self.scene.unet.set_attn_processor(self.before)
            self.scene.unet.zero_grad()
        else:
            self.control.__exit__(None, None, None)


def makes_graph(kind: Pass) -> bool:
    return kind.name.endswith("iteration")


class Cost(NamedTuple):
    """Of one pass: FLOPs, and the most bytes of activations held in it, with what it starts from."""

    flops: int
    peak: int


def cost_of(scene: Scene, kind: Pass) -> Cost:
    """What a pass costs, on a scene of tensors that need have no data. An iteration whose weights have gradients
    finds those of the one before it, but no maps of it: an official program may drop them.
    """
    with controlled(scene, kind.name), torch.set_grad_enabled(makes_graph(kind)), LiveBytes() as memory:
        with torch.no_grad():
            call = ready(scene, kind)
        for _ in range(2 if kind.name == "naive null iteration" else 1):
            with flop_counter() as counter:
                call()
            clear_tape(scene)
    return Cost(counter.get_total_flops(), memory.peak)


def now(scene: Scene) -> float:
    """Seconds; on a CPU those of this process's threads divided by their number, since the clock of a shared machine
    says more of its other guests than of a pass."""
    if scene.unet.device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


def timed_as(kind: Pass, device: str) -> tuple[Pass, int]:
    """The kind whose seconds, so many times, stand for `kind`'s: on a CPU, where a pass takes a quarter of a minute,
    one whose FLOPs are equal within 2 %."""
    if device == "cuda":
        return kind, 1
    if kind.name == "naive pair":
        return Pass("naive pass"), 2
    return (Pass(kind.name, True, True) if kind.name in ("source", "pair", "iteration") else kind), 1


def seconds_of(scene: Scene, kind: Pass, repeats: int = REPEATS) -> float:
    """Median seconds of a pass; on a GPU, after one to warm up."""
    times, warmup = [], int(scene.unet.device.type == "cuda")
    with controlled(scene, kind.name), torch.set_grad_enabled(makes_graph(kind)):
        with torch.no_grad():
            call = ready(scene, kind)
        for _ in range(warmup + repeats):
            start = now(scene)
            call()
            times.append(now(scene) - start)
            clear_tape(scene)
    return statistics.median(times[warmup:])


# ---------------------------------------------------------------------------------------------------------------------
# Whole programs
# ---------------------------------------------------------------------------------------------------------------------


def scale_of(vae) -> int:
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def decode(scene: Scene, latents: torch.Tensor) -> torch.Tensor:
    return scene.vae.decode((latents / scene.vae.config.scaling_factor).to(scene.vae.dtype), return_dict=False)[0]


def run_program(scene: Scene, program: str) -> None:
    """Run it whole, picture in to latents out or latents in to picture out."""
    if program == "naive edit":
        run_naive_edit(scene)
    else:
        with torch.no_grad():
            run_in_steps(scene, program)


def run_in_steps(scene: Scene, program: str) -> None:
    """Any program but the naive edit, without gradients but where it asks for them."""
    run, edit = scene.run, scene.edit
    latents = run.inversion.source_latents(0)
    if program == "sample":
        with controlled(scene, "plain"):
            both = join_conditioning([scene.null, edit.conditioning])
            for t in run.scheduler.timesteps:
                noise = guided_noise(*predict(scene.unet, latents.repeat(2, 1, 1, 1), t, both).chunk(2), GUIDANCE_SCALE)
                latents = run.scheduler.step(noise, t, latents).prev_sample
        decode(scene, latents)
    elif program == "edit":
        with controlled(scene, "edit"):
            for i, t in enumerate(run.scheduler.timesteps):
                (step,) = picture_step(run, i, t, latents, [edit])
                latents = step.latents
        decode(scene, latents)
    else:
        inverse = DDIMInverseScheduler.from_config(run.scheduler.config)
        inverse.set_timesteps(scene.steps)
        ready(scene, Pass("encode"))()
        latents = run.inversion.source_latents(scene.steps)
        bar = SimpleNamespace(update=lambda: None, set_postfix=lambda **_: None)
        texts = (edit.conditioning, scene.null)
        with controlled(scene, program):
            if program == "naive null_text":
                reference_null_text(scene, inverse, latents)
            else:
                rest = (
                    program,
                    GUIDANCE_SCALE,
                    INNER_STEPS,
                    0.0,
                    bar,
                )  # no early stop: what random weights do is chance
                invert_latents(scene.unet, run.scheduler, inverse, latents, *texts, *rest)


def run_naive_edit(scene: Scene) -> None:
    run, edit, settings = scene.run, scene.edit, scene.run.settings
    regions = [("object", r.token_indices, r.mask, r.mask) for r in edit.objects]
    regions += [("attribute", r.token_indices, r.mask, r.mask) for r in edit.attributes]
    scene.unet.requires_grad_(True)
    latents = naive_edit(
        SimpleNamespace(unet=scene.unet, scheduler=run.scheduler),
        run.inversion,
        run.source_conditioning.embeds,
        edit.conditioning.embeds,
        edit.alignment,
        regions,
        edit.mask.float(),
        [layer.name for layer in run.loss_layers],
        scene.injected,
        {**vars(settings), "guidance_scale": GUIDANCE_SCALE},
    )
    decode(scene, latents)


def reference_null_text(scene: Scene, inverse_scheduler, latents: torch.Tensor) -> None:
    """Null-text inversion with the passes of its reference implementation (arXiv 2212.09794): weights ask for
    gradients, which pile up unused, every inner step is taken, and the step is made by a pair of rows."""
    unet, scheduler, cond = scene.unet, scene.run.scheduler, scene.edit.conditioning
    trajectory = [latents]
    for t in inverse_scheduler.timesteps:
        latents = inverse_scheduler.step(predict(unet, latents, t, cond), t, latents).prev_sample
        trajectory.append(latents)
    null = scene.null.embeds.float()
    for i, t in enumerate(scheduler.timesteps):
        target, known = trajectory[-2 - i], predict(unet, latents, t, cond)
        null = null.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([null], lr=1e-2 * (1 - i / (2 * scene.steps)))
        for _ in range(INNER_STEPS):
            with torch.enable_grad():
                noise = guided_noise(predict(unet, latents, t, replace(scene.null, embeds=null)), known, GUIDANCE_SCALE)
                loss = F.mse_loss(scheduler.step(noise, t, latents).prev_sample, target)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
        both = join_conditioning([replace(scene.null, embeds=null.detach()), cond])
        pair = predict(unet, latents.repeat(2, 1, 1, 1), t, both)
        latents = scheduler.step(guided_noise(*pair.chunk(2), GUIDANCE_SCALE), t, latents).prev_sample


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


class Figures(NamedTuple):
    """FLOPs, seconds, and the peak of activations in bytes."""

    flops: float
    seconds: float
    peak: float

    def then(self, other: "Figures") -> "Figures":
        return Figures(self.flops + other.flops, self.seconds + other.seconds, max(self.peak, other.peak))

    def over(self, other: "Figures") -> "Figures":
        return Figures(*(mine / theirs for mine, theirs in zip(self, other)))


def total(passes: Counter[Pass], figures: dict[Pass, Figures]) -> Figures:
    """Of a program: its passes' sums, and the highest of their peaks."""
    return Figures(
        sum(n * figures[kind].flops for kind, n in passes.items()),
        sum(n * figures[kind].seconds for kind, n in passes.items()),
        max(figures[kind].peak for kind in passes),
    )


def count_passes(kinds: set[Pass]) -> dict[Pass, Cost]:
    """What passes cost at Stable Diffusion 1.4's size, on tensors without data."""
    with FakeTensorMode():
        scene = make_scene(*sd14(), LATENT_SIZE)
        return {kind: cost_of(scene, kind) for kind in sorted(kinds)}


def run_whole(scene: Scene, program: str) -> tuple[float, int]:
    """Seconds and peak bytes, apart from what was there before, of a program on a GPU."""
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), now(scene)
    run_program(scene, program)
    return now(scene) - start, torch.cuda.max_memory_allocated() - before


AIMS = {  # FLOPs and peak at most, of ours to the naive one's
    "guidance loop": (0.40, 0.5),
    "an edit, inverted before": (0.46, 0.5),
    "an edit with its null-text inversion": (0.61, 0.5),
}
# A program of ours: what its ratios are told by.
EDITS = {"**edit, defaults**": "", "edit, 15 iterations": ", 15 iterations"}
FAST, FAST_INVERSION = f"**edit, `fast`, {FAST_STEPS} steps**", f"direct inversion, {FAST_STEPS} steps"


def ratios_of(totals: dict[str, Figures], loops: dict[str, Figures], row: Figures) -> dict[tuple[str, str], Figures]:
    """Ours to the naive program's, by aim and by what is compared.

    Args:
        loops: of each edit, its iterations. row: the passes that the official program makes beside the naive one.
    """
    nulls = totals["**null-text inversion**"], totals["naive null-text inversion"]
    naive, ratios = totals["naive edit"], {}
    loop, alone, both = AIMS
    for name, said in EDITS.items():
        ratios[loop, said] = loops[name].over(loops["naive edit"])
        for baseline, official in ((naive, ""), (naive.then(row), ", official")):
            ratios[alone, said + official] = totals[name].over(baseline)
            ratios[both, said + official] = totals[name].then(nulls[0]).over(baseline.then(nulls[1]))
    return ratios


def ratio_table(ratios: dict[tuple[str, str], Figures]) -> str:
    """Markdown: each ratio of ours to the naive program's, what was aimed at, and what is met."""
    lines = ["| ours : naive | FLOPs | seconds | peak activations | aims (FLOPs, peak) | met |", "|---" * 6 + "|"]
    for (name, compared), ratio in ratios.items():
        aims = AIMS[name]
        met = {"FLOPs": ratio.flops <= aims[0], "peak": ratio.peak <= aims[1]}
        if not math.isnan(ratio.seconds):
            met["seconds"] = ratio.seconds <= 1.15 * ratio.flops  # what the FLOPs promise
        said = ", ".join(f"{what} {'yes' if true else '**no**'}" for what, true in met.items())
        shown = " | ".join(f"{value:.3f}" for value in ratio)
        lines.append(f"| {name}{compared} | {shown} | {aims[0]:.2f}, {aims[1]} | {said} |")
    return "\n".join(lines)


def machine() -> str:
    """In words: what computes, with how many threads, and what else ran."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{torch.get_num_threads()} threads of {name}"


def programs_of(unet: UNet2DConditionModel, vae: AutoencoderKL) -> dict[str, tuple[Scene, str]]:
    """The table's rows: name -> of which scene, its program."""
    scene, often = make_scene(unet, vae, LATENT_SIZE), make_scene(unet, vae, LATENT_SIZE, **AS_OFTEN)
    fast = make_scene(unet, vae, LATENT_SIZE, FAST_STEPS, **PRESETS["fast"])
    return {
        "plain sample, 50 steps": (scene, "sample"),
        "naive edit": (often, "naive edit"),
        "**edit, defaults**": (scene, "edit"),
        "edit, 15 iterations": (often, "edit"),
        FAST: (fast, "edit"),
        "naive null-text inversion": (scene, "naive null_text"),
        "**null-text inversion**": (scene, "null_text"),
        "negative-prompt inversion": (scene, "negative_prompt"),
        "direct inversion": (scene, "direct"),
        FAST_INVERSION: (fast, "direct"),
    }


def section(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    repeats: int,
    summed: Collection[str],
    count: Callable[[set[Pass]], dict[Pass, Cost]],
) -> str:
    """Markdown: the tables of one model in one dtype on one device. `count` tells what passes cost; `repeats` of 0
    times none of them; the programs in `summed` are not run whole on a GPU, either."""
    device, programs = unet.device.type, programs_of(unet, vae)
    scene, _ = programs["plain sample, 50 steps"]
    passes = {name: passes_of(*program) for name, program in programs.items()}
    kinds = {kind for counter in passes.values() for kind in counter}
    costs, seconds, load = count(kinds), {}, os.getloadavg()[0]
    for kind in sorted({timed_as(kind, device)[0] for kind in kinds}):
        seconds[kind] = seconds_of(scene, kind, repeats) if repeats else float("nan")
        print(f"{kind}: {seconds[kind]:.3f} s", flush=True)
    figures = {}
    for kind in kinds:
        stand_in, times = timed_as(kind, device)
        figures[kind] = Figures(costs[kind].flops, times * seconds[stand_in], costs[kind].peak)
    totals = {name: total(counter, figures) for name, counter in passes.items()}
    if device == "cuda":
        for name, program in programs.items():
            if program[1] not in summed:
                totals[name] = Figures(totals[name].flops, *run_whole(*program))

    row = total(Counter({Pass("naive pass"): scene.steps}), figures)  # the official program's, of the source
    loops = {
        name: total(Counter({kind: n for kind, n in passes[name].items() if kind.name.endswith("iteration")}), figures)
        for name in (*EDITS, "naive edit")
    }
    ratios = ratios_of(totals, loops, row)
    sample, quick = totals["plain sample, 50 steps"], totals[FAST]
    both = quick.then(totals[FAST_INVERSION])
    lines = [
        ratio_table(ratios),
        "",
        f"`fast`: an edit takes {quick.seconds / sample.seconds:.2f} of a plain sample's time, with its inversion"
        f" {both.seconds / sample.seconds:.2f} (FLOPs {quick.flops / sample.flops:.2f} and"
        f" {both.flops / sample.flops:.2f}).",
        "",
        "| program | TFLOP | seconds | peak activations, GiB | passes |",
        "|---" * 5 + "|",
    ]
    for name, one in totals.items():
        made = ", ".join(f"{n} {kind}" for kind, n in passes[name].items())
        lines.append(f"| {name} | {one.flops / TERA:.1f} | {one.seconds:.1f} | {one.peak / GIB:.2f} | {made} |")
    lines += ["", "| pass | GFLOP | seconds | peak activations in float32, GiB |", "|---" * 4 + "|"]
    for kind in sorted(kinds):
        one = figures[kind]
        lines.append(f"| {kind} | {one.flops / 1e9:.0f} | {one.seconds:.3f} | {one.peak / GIB:.2f} |")
    how = "not measured"
    if repeats and device == "cpu":
        how = f"of the processor's threads, each pass's (median of {repeats}) times its number"
    elif repeats:
        but = f" but for {', '.join(summed)}, the sums of their passes" if summed else ""
        how = f"of whole programs, run once,{but} and of passes the median of {repeats}"
    weights = sum(p.numel() * p.itemsize for model in (unet, vae) for p in model.parameters())
    lines += [
        "",
        f"{str(unet.dtype).removeprefix('torch.')}, {machine()}, torch {torch.__version__}; seconds: {how}; load"
        f" average before {load:.1f}, after {os.getloadavg()[0]:.1f}. Weights apart: {weights / GIB:.2f} GiB.",
    ]
    return "\n".join(lines).replace("nan", "–") + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file to write")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--sum", nargs="+", default=(), choices=PROGRAMS, help="not run whole on a GPU")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of each timed pass; on a CPU 0 times none")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counted = {}  # on float32 tensors, whichever dtype is timed

    def count(kinds: set[Pass]) -> dict[Pass, Cost]:
        if not counted:
            counted.update(count_passes(kinds))
        return counted

    args.out.parent.mkdir(parents=True, exist_ok=True)
    sections = []
    for dtype in args.dtype:
        with torch.device(device) if args.repeats else FakeTensorMode():  # without a pass to time, no need of data
            parts = [model.to(getattr(torch, dtype)) if args.repeats else model for model in sd14()]
        sections.append(section(*parts, args.repeats, args.sum, count))
        print(sections[-1], flush=True)
        args.out.write_text("\n".join(sections))  # what is there, should a later one fail


if __name__ == "__main__":
    main()
