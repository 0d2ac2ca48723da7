# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""Attention control: which layers attend where, which pass records, which pass injects, and the call of the U-Net.

Inside [`attention_control`] every layer obeys the [`Record`] or [`Inject`] that the caller hands to *that* call of
[`predict`]; a call without one is the model's own. No state outlives a call.
"""

import re
import threading
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from .conditioning import Conditioning
from .prompts import TokenAlignment


# ---------------------------------------------------------------------------------------------------------------------
# The U-Net's attention layers
# ---------------------------------------------------------------------------------------------------------------------


class AttentionLayer(NamedTuple):
    """One attention layer of the U-Net: its name among `unet.attn_processors`, its kind, its (height, width)."""

    name: str
    is_cross: bool
    size: tuple[int, int]

    @property
    def pixels(self) -> int:
        return self.size[0] * self.size[1]


def attention_layers(unet, latent_size: tuple[int, int]) -> list[AttentionLayer]:
    """All attention layers of an SD-shaped `unet` for latents of `latent_size` (h, w), in execution order."""
    sizes = [tuple(latent_size)]  # size at which each down block attends
    for block in unet.down_blocks:
        h, w = sizes[-1]
        # a stride-2 convolution with padding 1 rounds up
        sizes.append(((h + 1) // 2, (w + 1) // 2) if block.downsamplers is not None else (h, w))
    levels = len(unet.down_blocks)
    stage = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}

    layers = []
    for name in unet.attn_processors:
        place, numbers = name.split(".")[0], [int(n) for n in re.findall(r"\.(\d+)", name)]
        if "transformer_blocks" not in name or place not in stage:
            raise ValueError(f"The U-Net's attention layer {name!r} is not of Stable Diffusion's or SDXL's shape.")
        level = {"down_blocks": numbers[0], "mid_block": levels - 1, "up_blocks": levels - 1 - numbers[0]}[place]
        is_cross = ".attn2." in name
        layers.append(((stage[place], *numbers, is_cross), AttentionLayer(name, is_cross, sizes[level])))
    return [layer for _, layer in sorted(layers)]


def select_loss_layers(layers: Sequence[AttentionLayer], resolution: int | None = None) -> list[AttentionLayer]:
    """The cross-attention layers the losses read, in execution order (the `l` of Eq. 4).

    Args:
        layers: all of the U-Net's, from [`attention_layers`].
        resolution: the level's short side. `None`: the coarsest level with a short side of at least 16 (Stable
            Diffusion at 512 px: 16x16, the paper's and the official code's choice), else the finest.

    Raises:
        ValueError: the U-Net has no cross-attention, or no level of this resolution.
    """
    cross = [layer for layer in layers if layer.is_cross]
    if not cross:
        raise ValueError("This U-Net has no cross-attention: MDE-Edit reads the attention of words.")
    sides = sorted({min(layer.size) for layer in cross})
    if resolution is None:
        resolution = next((side for side in sides if side >= 16), sides[-1])
    if resolution not in sides:
        raise ValueError(f"`attention_resolution` is {resolution!r}; at this image size the U-Net has {sides}.")
    return [layer for layer in cross if min(layer.size) == resolution]


# ---------------------------------------------------------------------------------------------------------------------
# Control
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """Source pass (batch 1): keep what the edits will need. The dictionaries are filled by the pass.

    cross: layer name -> (heads, pixels, tokens) fp32, the probabilities A of Eq. 2.
    self_qk: layer name -> query and key, each (1, heads, pixels, head_dim).
    """

    cross_layers: frozenset
    self_layers: frozenset
    cross: dict[str, torch.Tensor] = field(default_factory=dict)
    self_qk: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    rows = 1  # of the batch that it acts on

    def reads(self, name: str) -> bool:
        return name in self.cross_layers or name in self.self_layers


@dataclass(frozen=True)
class Inject:
    """Target pass: take the source's attention where the prompts agree (Eq. 3). Acts on the batch's last rows, one per
    edit of one picture.

    Rows before them (the unconditional ones of classifier-free guidance) are left as they are.

    cross: layer name -> (edits, heads, pixels, tokens), the source's maps on each target's shared tokens
        ([`align_maps`]).
    shared: (edits, tokens) bool, the tokens those maps replace; the others keep the target's own map.
    self_qk: layer name -> the source's query and key; the targets' values are weighted by them.
    capture_layers, captured: layers whose *own* maps A* (before injection), (edits, heads, pixels, tokens), the pass
        puts into `captured`.
    exit_after: name of the layer at which the pass ends with [`UNetExit`]: what comes after has no reader.
    weights: layer name -> (edits, 1, pixels, tokens), by what the targets' own maps are multiplied where they are kept;
        without an entry they are kept as they are.
    """

    cross: dict[str, torch.Tensor]
    shared: torch.Tensor
    self_qk: dict[str, tuple[torch.Tensor, torch.Tensor]]
    capture_layers: frozenset = frozenset()
    captured: dict[str, torch.Tensor] = field(default_factory=dict)
    exit_after: str | None = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """The last rows of the batch that it acts on."""
        return len(self.shared)

    def reads(self, name: str) -> bool:
        return name in self.cross or name in self.self_qk or name in self.capture_layers

    def of(self, edits: Sequence[int]) -> "Inject":
        """The same of some edits alone, in this order."""
        if list(edits) == list(range(self.rows)):
            return self

        def pick(maps):
            return {name: pick_rows(m, edits) for name, m in maps.items()}

        shared = pick_rows(self.shared, edits)
        return replace(self, cross=pick(self.cross), shared=shared, weights=pick(self.weights))


class UNetExit(Exception):
    """Ends a U-Net pass at the last layer anyone reads; caught by whoever asked for it with `Inject.exit_after`."""


def pick_rows(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """`tensor[rows]`, without the copy of a list of numbers to the device, which waits for it."""
    return torch.cat([tensor[k : k + 1] for k in rows])


def align_maps(maps: dict[str, torch.Tensor], alignments: Sequence[TokenAlignment]) -> dict[str, torch.Tensor]:
    """Source maps (heads, pixels, source tokens) on the token positions of each target, zero at its new tokens:
    (targets, heads, pixels, tokens)."""
    return {name: torch.stack([m[..., a.mapper] * a.shared for a in alignments]) for name, m in maps.items()}


def stack_maps(maps: dict[str, torch.Tensor], layers: Sequence[AttentionLayer]) -> torch.Tensor:
    """The maps of `layers`, which have one size, as the losses read them: every head of every layer is a row.

    {layer name: (..., heads, pixels, tokens)} -> (..., layers x heads, pixels, tokens).
    """
    return torch.cat([maps[layer.name] for layer in layers], dim=-3)


class MDEAttnProcessor:
    """An attention layer that obeys the `control` of the call, and is the layer's own processor without one.

    name: of the layer, a key of `unet.attn_processors`. original: the processor that the layer had.
    """

    def __init__(self, name: str, original):
        self.name = name
        self.original = original

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, control=None
    ) -> torch.Tensor:
        """One attention layer, residual and normalization left to its block as in Stable Diffusion.

        Args:
            attn: diffusers' `Attention` module, whose projections are used.
            hidden_states: (batch, pixels, channels).
            encoder_hidden_states: (batch, tokens, dim) in cross-attention; `None` in self-attention.
            attention_mask: for the layer's own processor; Stable Diffusion has none.
            control: the [`Record`] or [`Inject`] of this call. Where it reads nothing of this layer, or without one,
                the original processor runs.

        Returns:
            (batch, pixels, channels) in the dtype of `hidden_states`.
        """
        if control is None or not control.reads(self.name):
            return self.original(
                attn, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask
            )

        def split_heads(states):  # (batch, tokens, heads * head_dim) -> (batch, heads, tokens, head_dim)
            return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        if encoder_hidden_states is None:
            context, attend = hidden_states, self._self_attention
        else:
            context, attend = encoder_hidden_states, self._cross_attention
            if attn.norm_cross:
                context = attn.norm_encoder_hidden_states(context)
        out = attend(attn, hidden_states, context, split_heads, control)
        out = out.transpose(1, 2).flatten(-2).to(hidden_states.dtype)  # (batch, pixels, heads * head_dim)
        for layer in attn.to_out:  # linear, dropout
            out = layer(out)
        return out / attn.rescale_output_factor

    def _self_attention(self, attn, hidden_states, context, split_heads, control):
        """(batch, pixels, channels) -> (batch, heads, pixels, head_dim). Recording keeps query and key of the pass;
        injecting puts the source's in the place of each edit's, whose value they weight."""
        value = split_heads(attn.to_v(context))
        if isinstance(control, Record):
            query, key = split_heads(attn.to_q(hidden_states)), split_heads(attn.to_k(context))
            control.self_qk[self.name] = (query, key)
        else:
            query, key = (states.expand(control.rows, -1, -1, -1) for states in control.self_qk[self.name])
            others = len(hidden_states) - control.rows
            if others:  # the rows before the edits' attend by themselves
                query = torch.cat([split_heads(attn.to_q(hidden_states[:others])), query])
                key = torch.cat([split_heads(attn.to_k(context[:others])), key])
        return F.scaled_dot_product_attention(query, key, value, scale=attn.scale)

    def _cross_attention(self, attn, hidden_states, context, split_heads, control):
        """(batch, pixels, channels), (batch, tokens, dim) -> (batch, heads, pixels, head_dim). The last rows' maps are
        materialized, to be recorded, captured or replaced on the shared tokens; the other rows attend by themselves.
        Raises [`UNetExit`] where the control says so."""
        query, key, value = (split_heads(f) for f in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))
        others = len(query) - control.rows
        # Eq. 2 in fp32, for the rows that are recorded or injected only.
        # Scaled keys are few numbers, scaled scores many, and their gradients as many again.
        scores = query[others:].float() @ (key[others:].float() * attn.scale).transpose(-1, -2)
        probs = scores.softmax(dim=-1)  # (rows, heads, pixels, tokens), sums to 1 over tokens
        if isinstance(control, Record):
            (control.cross[self.name],) = probs
        else:
            if self.name in control.capture_layers:
                control.captured[self.name] = probs
            if self.name == control.exit_after:
                raise UNetExit
            if self.name in control.cross:
                if self.name in control.weights:
                    probs = probs * control.weights[self.name]
                # (edits, tokens) -> (edits, 1, 1, tokens)
                shared = control.shared[:, None, None]
                probs = torch.where(shared, control.cross[self.name], probs)  # Eq. 3
        out = probs.to(value.dtype) @ value[others:]
        if others:
            rest = (states[:others] for states in (query, key, value))
            out = torch.cat([F.scaled_dot_product_attention(*rest, scale=attn.scale), out])
        return out


def check_untouched(unet) -> None:
    """Raise `ValueError` where another tool has changed what an attention layer of the U-Net computes or skips: its
    maps would not be those of the words at the pixels, or none."""
    for name, module in unet.named_modules():
        if type(module).__name__ == "ToMeBlock":
            raise ValueError(
                "tomesd is applied to this U-Net and merges pixels before they attend, so that no map says where a word"
                " is: call `tomesd.remove_patch(pipe)`."
            )
        # diffusers' caches replace a layer's forward; its offloading and casting only act before and after it
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        replacing = [hook for hook in hooks if hasattr(hooks[hook], "new_forward")]
        if replacing:
            raise ValueError(
                f"The U-Net's layer {name!r} has the hook {replacing[0]!r}, which reuses or skips what it computes, and"
                " an edit needs all of it: load the U-Net without this cache."
            )


_LOCKS: WeakKeyDictionary = WeakKeyDictionary()  # U-Net or tokenizer -> its lock, whichever pipelines share it
_STANCE = threading.RLock()  # held while one of the next two changes
_COMPILED: set["_Control"] = set()  # controls of compiled U-Nets at work
_STANCE_BEFORE = []  # what puts back the compiler's stance that was there before the first of them


def lock_of(part):
    """The lock that makes the uses of one U-Net or tokenizer follow each other, in whichever threads and pipelines.
    Re-entrant: its holder may call again, as in a callback. (A fast tokenizer at work borrows its own settings, and a
    second thread fails.)"""
    return _LOCKS.setdefault(getattr(part, "_orig_mod", part), threading.RLock())


@contextmanager
def attention_control(unet):
    """The one place that touches the U-Net: freezes its weights and lets each call bring its own control.

    Processors and every parameter's `requires_grad` are put back on any exit, also after an exception. One thread at a
    time; inside, the same thread may enter again, and is told so (`True`). Where attention layers are compiled, nothing
    runs compiled: controls change from call to call, and a pass may leave in the middle.
    """
    control = _Control(unet)
    with control:  # twice: where Ctrl-C cuts the inner one's leaving short, the outer one leaves in full
        with control:
            yield control.enter()


class _Control:
    """What [`attention_control`] changes and puts back. Leaving can be repeated, after any part of entering."""

    def __init__(self, unet):
        self.unet, self.lock = unet, lock_of(unet)
        self.held = self.stance_held = self.processors = self.grads = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # One line each takes or gives a lock and notes it: an interruption finds hardly any time in between.
        if self.processors is not None:
            self.unet.set_attn_processor(dict(self.processors))  # it empties the dictionary it is given
            for name, parameter in self.unet.named_parameters():
                parameter.requires_grad_(self.grads[name])
            self.processors = None  # once the lock is given back, the U-Net may be another thread's
        if self in _COMPILED or self.stance_held:
            self.stance_held = self.stance_held or _STANCE.acquire()
            _COMPILED.discard(self)
            if not _COMPILED and _STANCE_BEFORE:
                _STANCE_BEFORE[0].__exit__(None, None, None)
                _STANCE_BEFORE.clear()
            self.stance_held = _STANCE.release()
        if self.held:
            self.held = self.lock.release()

    def enter(self) -> bool:
        self.held = self.lock.acquire()
        processors = dict(self.unet.attn_processors)
        if any(isinstance(processor, MDEAttnProcessor) for processor in processors.values()):
            return True  # a call within a call, under the control that is there
        # by name: CPU offload replaces the parameters it moves
        self.grads = {name: p.requires_grad for name, p in self.unet.named_parameters()}
        self.processors = processors
        self.unet.requires_grad_(False)
        self.unet.set_attn_processor({name: MDEAttnProcessor(name, p) for name, p in processors.items()})
        set_stance = getattr(torch.compiler, "set_stance", None)  # torch 2.6
        if set_stance is not None and _compiles_attention(self.unet):
            # The stance is the process's: the first that needs it sets it, the last puts it back, in whichever threads.
            self.stance_held = _STANCE.acquire()
            _COMPILED.add(self)
            if not _STANCE_BEFORE:
                _STANCE_BEFORE.append(set_stance("force_eager"))
            self.stance_held = _STANCE.release()
        return False


def _compiles_attention(unet) -> bool:
    """Whether `torch.compile` wraps the U-Net or a part of it that holds attention layers."""
    compiled = (
        module
        for module in unet.modules()
        if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
    )
    return any(hasattr(layer, "set_processor") for part in compiled for layer in part.modules())


# ---------------------------------------------------------------------------------------------------------------------
# The call of the U-Net
# ---------------------------------------------------------------------------------------------------------------------

# fp16 gradients of a mean over a latent underflow; scaled by this they do not, and the scale is taken out in fp32.
FP16_LOSS_SCALE = 2.0**12


def gradient(loss: torch.Tensor, inputs: torch.Tensor, model_dtype: torch.dtype) -> torch.Tensor:
    """d loss / d inputs in fp32, through a model that computes in `model_dtype`."""
    scale = FP16_LOSS_SCALE if model_dtype == torch.float16 else 1.0
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(loss * scale, inputs)
    return grad.float() / scale


@contextmanager
def lora_strength(model, scale: float):
    """`model` with its active adapters (peft's) at `scale` times the strengths they have, which it has again on any
    exit, to the bit: diffusers' own way divides them back, and forgets them at 0."""
    layers = [m for m in model.modules() if hasattr(m, "scale_layer")] if scale != 1 else []
    strengths = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scale_layer(scale)
        yield
    finally:
        for layer, strength in zip(layers, strengths):
            layer.scaling.update(strength)


def compute_dtype(unet) -> torch.dtype:
    """`unet.dtype`, without its walk over all modules (as long as a tenth of a small model's pass) unless the weights
    are stored in another dtype than they compute in."""
    first = next((p.dtype for p in unet.parameters() if p.is_floating_point()), torch.int8)
    return first if first.itemsize > 1 else unet.dtype


def predict(
    unet,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    conditioning: Conditioning,
    control: Record | Inject | None = None,
    lora_scale: float = 1.0,
) -> torch.Tensor:
    """One U-Net call in the U-Net's dtype on fp32 latents and embeddings; the prediction comes back in fp32.

    Args:
        latents: (batch, channels, h, w).
        conditioning: of as many rows.
        control: what the attention layers do in this call, inside [`attention_control`].
        lora_scale: of the adapters in this call, times the strengths they have.

    Returns:
        (batch, channels, h, w) fp32: noise or velocity, whichever the model predicts.
    """
    # Weights stored in fp8 are in the compute dtype only while their layer runs, not when the backward pass needs them.
    small = torch.is_grad_enabled() and any(p.is_floating_point() and p.itemsize == 1 for p in unet.parameters())
    saving = torch.autograd.graph.saved_tensors_hooks(_pack, _unpack) if small else nullcontext()
    dtype = compute_dtype(unet)
    with saving, lora_strength(unet, lora_scale):
        return unet(
            latents.to(dtype),
            timestep,
            **conditioning.to(dtype).unet_arguments(),
            cross_attention_kwargs=None if control is None else {"control": control},
            return_dict=False,
        )[0].float()


def _pack(saved: torch.Tensor):
    """For the backward pass: a weight as itself and the dtype it had, anything else as it is."""
    return (saved, saved.dtype) if isinstance(saved, torch.nn.Parameter) else saved


def _unpack(packed):
    return packed[0].to(packed[1]) if isinstance(packed, tuple) else packed


def own_maps(
    unet,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    conditioning: Conditioning,
    control: Inject,
    layers: Sequence[AttentionLayer],
    lora_scale: float = 1.0,
) -> torch.Tensor:
    """A* of `layers` (in execution order), before injection, by a pass that leaves the U-Net after the last of them.

    Args:
        latents: (edits, channels, h, w), `conditioning` of as many rows.

    Returns:
        (edits, layers x heads, pixels, tokens) fp32, differentiable in `latents`.
    """
    captured: dict[str, torch.Tensor] = {}
    names = frozenset(layer.name for layer in layers)
    control = replace(control, capture_layers=names, captured=captured, exit_after=layers[-1].name)
    try:
        predict(unet, latents, timestep, conditioning, control, lora_scale)
    except UNetExit:
        pass
    return stack_maps(captured, layers)
