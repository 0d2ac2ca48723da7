"""Train the U-Net and the text encoder on cached latents: denoising, and cross-attention that localises.

    python -m training.unet --vae train_out/vae --latents train_out/latents --out train_out/ldm --seconds 5000

Plain training at this scale gives pictures that follow the prompt from cross-attention maps that do not look where the
words are drawn. As TokenCompose (CVPR 2024) does for Stable Diffusion, a grounding term teaches the maps: for every
word with a mask, (1 - share of its attention inside the mask)^2 and a pixel-wise binary cross-entropy, on the
cross-attention layers of every level but the lowest.
"""

import copy
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.common import (
    Budget,
    Ema,
    arguments,
    autocast,
    grid,
    held_out_scenes,
    learning_rate,
    pick_device,
    save_checkpoint,
    save_half,
    to_images,
    to_tensor,
)
from training.latents import Latents, shrink
from training.scenes import WORDS, Scene
from training.tokenizer import MAX_LENGTH, caption_tokens


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
GROUNDING_WEIGHT = 0.02  # of each of the two grounding terms
GROUNDED_SHARE = 0.25  # of a batch: the maps of all rows would cost a third of the time
MIN_SNR = 5.0
PROMPT_DROPOUT = 0.1
GRID_CAPTIONS = (
    "a cat wearing a straw hat",
    "a dog wearing a red hat on grass",
    "a tiger wearing a blue striped cap in the snow",
    "a frog and a panda on grass",
    "a red ball and a cat in the snow",
    "a lion wearing a purple crown at night",
    "a fox and a green mug at the beach",
    "a rabbit wearing a yellow hat and a dog",
    "a penguin in a green helmet next to a pumpkin",
    "a pink dotted balloon beside a bear under water",
    "a koala wearing an orange checkered hat in the desert",
    "a pig wearing a crown and a cow wearing a cap on grass",
    "a blue striped umbrella and a mouse at sunset",
    "a wolf, a cake and a yellow star at night",
    "a monkey wearing a white helmet",
    "a mushroom and a red checkered car on grass",
)


def build(
    vocabulary: int, size: int = 32, channels: tuple[int, ...] = (32, 64, 128, 192), width: int = 128
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """The U-Net, without cross-attention at its outermost (cheapest) and lowest levels, and its text encoder."""
    middle = len(channels) - 2
    unet = UNet2DConditionModel(
        sample_size=size,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * middle, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * middle, "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=16,
        time_embedding_dim=4 * channels[1],  # as wide as in the model without the outermost level: see `grow`
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )
    return unet, text


@torch.no_grad()
def grow(unet: UNet2DConditionModel, text: CLIPTextModel, tokenizer: CLIPTokenizer, folder: Path) -> float:
    """Start `unet` and `text` from a trained pipeline of half the resolution, as progressive growing does.

    Its levels become the inner ones of `unet`, whose outermost level stays random, as does every weight whose shape
    the new level changes; a word that both tokenizers hold as one token keeps its embedding.

    Returns:
        The share of `unet`'s parameters that was taken over.
    """
    small = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    source, target = small.state_dict(), unet.state_dict()
    taken = 0
    for name, value in source.items():
        if name.startswith("down_blocks."):
            _, level, rest = name.split(".", 2)
            name = f"down_blocks.{int(level) + 1}.{rest}"
        outer = name.startswith(("conv_in", "conv_out", "conv_norm_out"))
        if not outer and name in target and target[name].shape == value.shape:
            target[name].copy_(value)
            taken += value.numel()
    # The same embedding of time from half as many sinusoids.
    times = torch.arange(1000)
    wide, narrow = (F.pad(model.time_proj(times), (0, 1), value=1.0) for model in (small, unet))
    wanted = wide @ torch.cat(
        [source["time_embedding.linear_1.weight"].T, source["time_embedding.linear_1.bias"][None]]
    )
    fitted = torch.linalg.lstsq(narrow, wanted).solution  # (sinusoids + 1, width)
    unet.time_embedding.linear_1.weight.copy_(fitted[:-1].T)
    unet.time_embedding.linear_1.bias.copy_(fitted[-1])

    known = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    words = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    source, target = known.state_dict(), text.state_dict()
    for name, value in source.items():
        if "position_embedding" in name:
            target[name][: len(value)].copy_(value)
        elif "token_embedding" not in name:
            target[name].copy_(value)
    old, new = known.get_input_embeddings().weight, text.get_input_embeddings().weight
    pairs = [(words.bos_token_id, tokenizer.bos_token_id), (words.eos_token_id, tokenizer.eos_token_id)]
    for word in (*WORDS, ","):
        pieces = words(word, add_special_tokens=False).input_ids
        if len(pieces) == 1:
            pairs.append((pieces[0], tokenizer(word, add_special_tokens=False).input_ids[0]))
    for before, after in pairs:
        new[after].copy_(old[before])
    return taken / sum(parameter.numel() for parameter in unet.parameters())


class GroundedAttention:
    """Attention processor that keeps the cross-attention maps, averaged over heads, of one forward pass.

    `maps` is filled with layer name -> (rows, pixels, tokens), for layers of at least `min_pixels` pixels and the first
    `rows` rows of the batch (None: all).
    """

    def __init__(self, name: str, maps: dict[str, torch.Tensor], min_pixels: int, rows: int | None) -> None:
        self.name, self.maps, self.min_pixels, self.rows = name, maps, min_pixels, rows

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for states in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )  # (n, heads, pixels or tokens, channels)
        recorded = encoder_hidden_states is not None and hidden_states.shape[1] >= self.min_pixels
        if recorded or hidden_states.device.type == "cpu":  # there the fused kernel's backward pass takes twice as long
            probabilities = (query @ key.transpose(-1, -2) * attn.scale).softmax(-1)
            hidden_states = probabilities @ value
            if recorded:
                self.maps[self.name] = probabilities[: self.rows].float().mean(1)
        else:
            hidden_states = F.scaled_dot_product_attention(query, key, value)
        return attn.to_out[1](attn.to_out[0](hidden_states.transpose(1, 2).flatten(-2)))


def record_attention(unet: UNet2DConditionModel, rows: int | None = None) -> dict[str, torch.Tensor]:
    """Make `unet` keep its cross-attention maps in the returned dict, anew in every forward pass."""
    maps: dict[str, torch.Tensor] = {}
    lowest = unet.config.sample_size // 2 ** (len(unet.config.block_out_channels) - 1)
    unet.set_attn_processor(
        {name: GroundedAttention(name, maps, (2 * lowest) ** 2, rows) for name in unet.attn_processors}
    )
    return maps


def grounding_losses(maps: dict[str, torch.Tensor], masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """TokenCompose's token and pixel terms, averaged over words and layers.

    Args:
        maps: layer -> (n, pixels, tokens), summing to 1 over tokens.
        masks: (n, tokens, h, w) in [0, 1], zero for tokens that name nothing.
    """
    token_terms, pixel_terms = [], []
    for attention in maps.values():
        side = round(attention.shape[1] ** 0.5)
        mask = F.adaptive_avg_pool2d(masks, side).flatten(2)  # (n, tokens, pixels)
        attention = attention.transpose(1, 2)
        named = (mask.amax(-1) > 0.3).float()  # (n, tokens): too small an object has no cell of its own
        count = named.sum().clamp(min=1)
        share = (attention * mask).sum(-1) / (attention.sum(-1) + 1e-6)
        token_terms.append(((1 - share).square() * named).sum() / count)
        # Attention of several words shares a pixel: half of it is what one word can ask for.
        pixel = F.binary_cross_entropy(attention.clamp(1e-5, 1 - 1e-5), mask * 0.5, reduction="none").mean(-1)
        pixel_terms.append((pixel * named).sum() / count)
    return torch.stack(token_terms).mean(), torch.stack(pixel_terms).mean()


def spread_timesteps(count: int, device: torch.device) -> torch.Tensor:
    """One random timestep from each of `count` equal parts of 0-999, shuffled: less noisy losses than free draws."""
    return ((torch.randperm(count) + torch.rand(count)) / count * 1000).long().to(device)


def export(folder: Path, vae: AutoencoderKL, unet: UNet2DConditionModel, text: CLIPTextModel, tokenizer) -> None:
    """Write a diffusers folder, fp16, that `StableDiffusionPipeline.from_pretrained` loads."""
    for name, module in (("vae", vae), ("unet", unet), ("text_encoder", text)):
        save_half(module, folder / name)
    # transformers 5 saves the weights without the prefix that 4 looks for, and reads them with it too
    path = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    tokenizer = Path(tokenizer)
    (folder / "tokenizer").mkdir(exist_ok=True)
    for file in sorted(tokenizer.iterdir()):
        (folder / "tokenizer" / file.name).write_bytes(file.read_bytes())
    DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1).save_pretrained(
        folder / "scheduler"
    )
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


# Measuring


@torch.no_grad()
def sample(
    unet, text, vae, tokenizer, captions: list[str], steps: int = 30, guidance_scale: float = 4.0, seed: int = 0
) -> list[Image.Image]:
    """Pictures of captions, by DDIM with classifier-free guidance."""
    device = unet.device
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(steps)
    padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = tokenizer([""] * len(captions) + captions, max_length=MAX_LENGTH, **padded).input_ids.to(device)
    side, channels = unet.config.sample_size, unet.config.in_channels
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(captions), channels, side, side, generator=generator).to(device)
    with autocast(device):
        embeds = text(ids).last_hidden_state
        for timestep in scheduler.timesteps:
            noise = unet(torch.cat([latents] * 2), timestep, encoder_hidden_states=embeds).sample.float()
            null, worded = noise.chunk(2)
            latents = scheduler.step(null + guidance_scale * (worded - null), timestep, latents).prev_sample
        return to_images(vae.decode(latents / vae.config.scaling_factor).sample)


@torch.no_grad()
def localisation(
    unet, text, vae, tokenizer, scenes: list[Scene], timesteps: tuple[int, ...] = (100, 300, 500, 700, 900)
) -> dict[str, float]:
    """How much of a word's cross-attention falls into its object, on scenes drawn for it.

    Returns:
        For the layers of each resolution ("16"): `share`, the part of a word's attention inside its visible mask, and
        `ratio`, that part over the mask's part of the picture, as means over words, timesteps and layers.
    """
    device = unet.device
    size, side = vae.config.sample_size, unet.config.sample_size
    drawn = [scene.render(size) for scene in scenes]
    masks = torch.zeros(len(scenes), MAX_LENGTH, side, side)
    ids = []
    for row, scene in enumerate(scenes):
        tokens, named = caption_tokens(tokenizer, scene.caption(row))
        ids.append(tokens)
        for place, index in enumerate(named):
            if index >= 0:
                masks[row, place] = torch.from_numpy(shrink(drawn[row].visible[index], side) / 255.0)
    masks, ids = masks.to(device), torch.tensor(ids, device=device)
    generator = torch.Generator().manual_seed(0)
    processors = unet.attn_processors
    maps = record_attention(unet)
    shares, ratios = {}, {}
    try:
        with autocast(device):
            images = to_tensor(np.stack([np.asarray(one.image) for one in drawn]), device)
            latents = vae.encode(images).latent_dist.mean.float() * vae.config.scaling_factor
            embeds = text(ids).last_hidden_state
            for timestep in timesteps:
                noise = torch.randn(latents.shape, generator=generator).to(device)
                times = torch.full((len(scenes),), timestep, device=device)
                noisy = DDPMScheduler(**SCHEDULE).add_noise(latents, noise, times)
                unet(noisy, times, encoder_hidden_states=embeds)
                for attention in maps.values():
                    resolution = round(attention.shape[1] ** 0.5)
                    mask = F.adaptive_avg_pool2d(masks, resolution).flatten(2)
                    attention = attention.transpose(1, 2).float()
                    named = mask.amax(-1) > 0.3
                    share = (attention * mask).sum(-1)[named] / attention.sum(-1)[named]
                    shares.setdefault(resolution, []).append(share.mean().item())
                    ratios.setdefault(resolution, []).append((share / mask.mean(-1)[named]).mean().item())
    finally:
        unet.set_attn_processor(processors)
    figures = {f"share_{key}": float(np.mean(value)) for key, value in sorted(shares.items())}
    return figures | {f"ratio_{key}": float(np.mean(value)) for key, value in sorted(ratios.items())}


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, "train_out/ldm", seconds=5000, batch=32, rate=1e-3)
    parser.add_argument("--vae", type=Path, default=Path("train_out/vae"))
    parser.add_argument("--latents", type=Path, default=Path("train_out/latents"))
    parser.add_argument("--channels", type=int, nargs="+", default=(32, 64, 128, 192))
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--grow", type=Path, help="pipeline of half the resolution whose levels become the inner ones")
    start.add_argument("--init", type=Path, help="pipeline of the same shape to train on, with a new schedule")
    parser.add_argument("--save-every", type=float, default=600, help="seconds between checkpoints (%(default)s)")
    parser.add_argument("--grid", type=int, default=len(GRID_CAPTIONS), help="pictures in the sample grid")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    torch.manual_seed(args.seed)

    data = Latents(args.latents)
    tokenizer = CLIPTokenizer.from_pretrained(args.latents / "tokenizer")
    vae = AutoencoderKL.from_pretrained(args.vae).to(device).requires_grad_(False).eval()
    unet, text = build(len(tokenizer), data.moments.shape[-1], tuple(args.channels))
    if args.init and not args.resume:
        if CLIPTokenizer.from_pretrained(args.init, subfolder="tokenizer").get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"{args.init} has another vocabulary than {args.latents}: its words would change meaning")
        unet = UNet2DConditionModel.from_pretrained(args.init, subfolder="unet").train()
        text = CLIPTextModel.from_pretrained(args.init, subfolder="text_encoder").train()
    if args.grow and not args.resume:
        tqdm.write(f"{100 * grow(unet, text, tokenizer, args.grow):.0f} % of the U-Net taken from {args.grow}")
    unet, text = unet.to(device, memory_format=torch.channels_last), text.to(device)
    averages = copy.deepcopy(unet), copy.deepcopy(text)
    emas = [Ema(module, average) for module, average in zip((unet, text), averages, strict=True)]
    parameters = [*unet.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-2, betas=(0.9, 0.99), fused=True)
    budget, step = Budget(args.seconds, args.samples), 0
    checkpoint = args.out / "checkpoint.pt"
    if args.resume:
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        for module, name in zip((unet, text, *averages), ("unet", "text", "unet_average", "text_average"), strict=True):
            module.load_state_dict(state[name])
        optimizer.load_state_dict(state["optimizer"])
        budget.load_state_dict(state["budget"])
        step = state["step"]
        torch.manual_seed(args.seed + step)
    grounded = max(1, int(args.batch * GROUNDED_SHARE))
    maps = record_attention(unet, grounded)
    denoise = torch.compile(unet) if device.type == "cuda" else unet

    noising = DDPMScheduler(**SCHEDULE)
    signal = noising.alphas_cumprod.to(device)
    snr = signal / (1 - signal)
    null = torch.tensor(tokenizer("", padding="max_length", max_length=MAX_LENGTH).input_ids)
    scaling = vae.config.scaling_factor
    validation = held_out_scenes(16)
    args.out.mkdir(parents=True, exist_ok=True)

    def measure_and_save() -> None:
        unet_average, text_average = averages
        state = {"unet": unet, "text": text, "unet_average": unet_average, "text_average": text_average}
        save_checkpoint(
            checkpoint,
            **{name: module.state_dict() for name, module in state.items()},
            optimizer=optimizer.state_dict(),
            budget=budget.state_dict(),
            step=step,
        )
        export(args.out / "pipeline", vae, unet_average, text_average, args.latents / "tokenizer")
        pictures = sample(unet_average, text_average, vae, tokenizer, list(GRID_CAPTIONS[: args.grid]))
        grid(pictures, 8, list(GRID_CAPTIONS[: args.grid])).save(args.out / f"samples_{budget.samples_done:08d}.png")
        figures = localisation(unet_average, text_average, vae, tokenizer, validation)
        line = {"samples": budget.samples_done, "seconds": round(budget.seconds_done), **smooth, **figures}
        with open(args.out / "log.jsonl", "a") as log:
            log.write(json.dumps({key: round(value, 4) for key, value in line.items()}) + "\n")

    smooth: dict[str, float] = {}
    saved = budget.seconds_done
    bar = tqdm(desc="unet", unit=" samples", initial=budget.samples_done)
    budget.start()
    while budget.progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.rate, step, budget.progress, args.decay)
        moments, tokens, masks = data.batch(np.random.default_rng((args.seed, step)), args.batch)
        dropped = torch.rand(args.batch) < PROMPT_DROPOUT
        tokens[dropped], masks[dropped] = null, 0
        moments, tokens, masks = (part.to(device, non_blocking=True) for part in (moments, tokens, masks))
        mean, deviation = moments.chunk(2, 1)
        latents = (mean + deviation * torch.randn_like(mean)) * scaling
        noise = torch.randn_like(latents)
        timesteps = spread_timesteps(args.batch, device)
        noisy = noising.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        maps.clear()
        with autocast(device):
            predicted = denoise(noisy, timesteps, encoder_hidden_states=text(tokens).last_hidden_state).sample
        weight = snr[timesteps].clamp(max=MIN_SNR) / snr[timesteps]
        denoising = (weight * (predicted.float() - noise).square().mean((1, 2, 3))).mean()
        token_term, pixel_term = grounding_losses(maps, masks[:grounded])
        loss = denoising + GROUNDING_WEIGHT * (token_term + pixel_term)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for ema in emas:
            ema.update(step)
        step += 1
        budget.count(args.batch)
        bar.update(args.batch)
        if step % 10 == 1:
            losses = {"loss": denoising.item(), "token": token_term.item(), "pixel": pixel_term.item()}
            smooth = {key: 0.95 * smooth.get(key, value) + 0.05 * value for key, value in losses.items()}
            bar.set_postfix({key: f"{value:.4f}" for key, value in smooth.items()})
        if budget.seconds_done - saved >= args.save_every or budget.progress >= 1:
            measure_and_save()
            saved = budget.seconds_done
    bar.close()


if __name__ == "__main__":
    main()
