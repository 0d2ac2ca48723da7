"""Train the autoencoder: 128 px pictures <-> 32x32x4 latents (`AutoencoderKL`, a factor of 4).

    python -m training.vae --out train_out/vae --seconds 900

Trained on 64 px crops first (it is fully convolutional), on whole 128 px pictures at the end. Its GroupNorm
layers couple distant pixels, so that latents edited in one place would tint the rest of the picture; part of every
batch therefore decodes composites of two scenes' latents, and is asked for the composite picture.
"""

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm

from training.common import (
    Budget,
    arguments,
    autocast,
    grid,
    held_out_scenes,
    learning_rate,
    pick_device,
    psnr,
    render_all,
    save_checkpoint,
    scene_image,
    to_images,
    to_tensor,
)
from training.scenes import ANIMALS, THINGS, Scene


KL_WEIGHT = 2e-3


def build(channels: tuple[int, ...] = (16, 32, 64), groups: int = 1, sample_size: int = 128) -> AutoencoderKL:
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=groups,
        sample_size=sample_size,
        mid_block_add_attention=False,  # attention would couple distant pixels still more
    )
    # Begin with little posterior noise. At the default, of standard deviation 1, the first few hundred steps see hardly
    # more than noise, and the picture's weaker color axes are learned late.
    torch.nn.init.constant_(vae.quant_conv.bias[vae.config.latent_channels :], -6.0)
    return vae


def random_masks(count: int, size: int) -> torch.Tensor:
    """(count, 1, size, size) of 0 and 1: ellipses and boxes of object size at latent resolution."""
    center = 0.2 + 0.6 * torch.rand(count, 2, 1, 1)
    radius = 0.12 + 0.25 * torch.rand(count, 2, 1, 1)
    place = (torch.arange(size) + 0.5) / size
    away = (torch.stack(torch.meshgrid(place, place, indexing="ij")) - center) / radius  # (count, 2, size, size)
    power = torch.where(torch.rand(count, 1, 1) < 0.5, 2.0, 8.0)
    return ((away.abs() ** power[:, None]).sum(1, keepdim=True) < 1).float()


def composites(latents: torch.Tensor, images: torch.Tensor, masks: torch.Tensor, gain: torch.Tensor):
    """Latents of the next scene inside masks, of this one outside, and what they should decode to.

    Args:
        latents: (n, 4, h, w).
        images: (n, 3, s, s).
        masks: (n, 1, h, w) of 0 and 1.
        gain: (n, 1, 1, 1) factor on the latents inside. Editing overshoots; where this is not 1 only the outside has a
            right answer.

    Returns:
        Composite latents, composite pictures and the weight (n, 1, s, s) of each pixel: 0 within one latent of the
        seam, where no right answer exists.
    """
    scale = images.shape[-1] // latents.shape[-1]
    large = F.interpolate(masks, scale_factor=scale)
    mixed = torch.lerp(latents, latents.roll(1, 0) * gain, masks)
    target = torch.lerp(images, images.roll(1, 0), large)
    grown, shrunk = F.max_pool2d(masks, 3, 1, 1), -F.max_pool2d(-masks, 3, 1, 1)
    weight = (1 - grown) + shrunk * (gain == 1)
    return mixed, target, F.interpolate(weight, scale_factor=scale)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """L1 + L1 of the gradients + 2 x MSE + 2 x L1 of the coarse opponent colors, over weighted pixels.

    Without the last term red against green, the weakest color axis, has no latent channel for most of the training.
    """
    difference = (output - target) * weight
    share = weight.mean()
    red, green, blue = F.avg_pool2d(difference, 4).unbind(1)
    opponent = (red - green).abs().mean() + (blue - (red + green) / 2).abs().mean()
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return (difference.abs().mean() + edges + 2 * difference.square().mean() + 2 * opponent) / share


def with_another_object(scene: Scene) -> Scene:
    """The scene with its rearmost animal or thing replaced by the next kind, as an ideal edit would."""
    first = scene.objects[0]
    kinds = list(ANIMALS if first.kind in ANIMALS else THINGS)
    return scene.edited({0: kinds[(kinds.index(first.kind) + 1) % len(kinds)]})


@torch.no_grad()
def evaluate(vae: AutoencoderKL, scenes: list[Scene], size: int, device: torch.device) -> tuple[dict, torch.Tensor]:
    """Round-trip PSNR, and how much background PSNR it costs to decode other latents inside some masks.

    Inside lie, for `edit`, the latents of the scene with one object replaced; inside all objects' masks, for `scene`,
    another scene's, for `double`, twice those, and for `noise`, noise. Background is what lies a latent from the masks.

    Returns:
        figures, and pictures (source, decoded, mixed with another scene).
    """
    generator = torch.Generator().manual_seed(0)

    def encode(drawn: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
        images = to_tensor(np.stack([scene_image((scene, size)) for scene in drawn]), device)
        return images, vae.encode(images).latent_dist.mean.float()

    images, latents = encode(scenes)
    ideal, ideal_latents = encode([with_another_object(scene) for scene in scenes])
    decoded = vae.decode(latents).sample
    objects = [np.any(scene.render(size).full, axis=0) for scene in scenes]
    all_objects = torch.from_numpy(np.stack(objects))[:, None].float().to(device)
    changed = ((images - ideal).abs().amax(1, keepdim=True) > 0.02).float()
    noise = torch.randn(latents.shape, generator=generator).to(device) * latents.std()
    other = latents.roll(1, 0)
    figures = {"psnr": psnr(decoded, images).mean().item()}
    for name, masks, content in (
        ("edit", changed, ideal_latents),
        ("double", all_objects, 2 * other),
        ("noise", all_objects, noise),
        ("scene", all_objects, other),
    ):
        inside = (F.avg_pool2d(F.max_pool2d(masks, 9, 1, 4), size // latents.shape[-1]) > 0).float()
        outside = 1 - F.max_pool2d(F.interpolate(inside, size=(size, size)), 9, 1, 4)
        mixed = vae.decode(torch.lerp(latents, content, inside)).sample
        lost = psnr(decoded, images, outside) - psnr(mixed, images, outside)
        figures[f"background_loss_{name}"] = lost.mean().item()
    return figures, torch.cat([images[:8], decoded[:8], mixed[:8]])


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, "train_out/vae", seconds=900, batch=16, rate=1.5e-3)
    parser.add_argument("--pictures", type=int, default=6000, help="scenes to draw crops from (%(default)s)")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures (%(default)s)")
    parser.add_argument("--crop", type=int, default=64, help="side of the crops of the first part (%(default)s)")
    parser.add_argument("--channels", type=int, nargs="+", default=(16, 32, 64))
    parser.add_argument("--init", type=Path, help="autoencoder to start from instead of random weights")
    parser.add_argument(
        "--freeze-encoder", action="store_true", help="train the decoder alone: latents stay as they are"
    )
    parser.add_argument("--composites", type=float, default=0.4, help="share of a batch (%(default)s)")
    parser.add_argument("--measured", type=int, default=64, help="held-out scenes to measure on (%(default)s)")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    random.seed(args.seed)

    if args.init:
        vae = AutoencoderKL.from_pretrained(args.init)
        vae.register_to_config(sample_size=args.size)
    else:
        vae = build(tuple(args.channels), sample_size=args.size)
    vae = vae.to(device, memory_format=torch.channels_last).train()
    if args.freeze_encoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=1e-4, betas=(0.9, 0.99), fused=True)
    budget, step = Budget(args.seconds, args.samples), 0
    checkpoint = args.out / "checkpoint.pt"
    if args.resume:
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        budget.load_state_dict(state["budget"])
        step = state["step"]
    encode, decode = vae.encode, vae.decode
    if device.type == "cuda":
        encode, decode = torch.compile(vae.encode), torch.compile(vae.decode)

    jobs = [(args.seed * args.pictures + index, args.size) for index in range(args.pictures)]
    pictures = np.stack(list(tqdm(render_all(scene_image, jobs), "drawing", len(jobs))))
    validation = held_out_scenes(args.measured)
    bar = tqdm(desc="vae", unit=" crops", initial=budget.samples_done)
    budget.start()
    while budget.progress < 1:
        whole = budget.progress > 0.85
        side = args.size if whole else args.crop
        count = max(4, args.batch * args.crop**2 // side**2)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.rate, step, budget.progress, args.decay)
        chosen = np.random.default_rng((args.seed, step)).integers(0, len(pictures), count)
        top, left = (random.randrange(0, args.size - side + 1, 2) for _ in range(2))
        images = to_tensor(pictures[chosen, top : top + side, left : left + side], device)
        if random.random() < 0.5:
            images = images.flip(-1)
        with autocast(device):
            posterior = encode(images).latent_dist
            latents = posterior.sample()
            mixed = max(2, int(count * args.composites))
            masks = random_masks(mixed, latents.shape[-1]).to(device)
            gain = torch.where(torch.rand(mixed, 1, 1, 1) < 0.5, 1.0, 0.3 + 2 * torch.rand(mixed, 1, 1, 1)).to(device)
            parts = composites(latents[:mixed].float(), images[:mixed], masks, gain)
            target = torch.cat([parts[1], images[mixed:]])
            weight = torch.cat([parts[2], torch.ones_like(images[mixed:, :1])])
            output = decode(torch.cat([parts[0], latents[mixed:].float()])).sample
        rebuilt = reconstruction_loss(output.float(), target, weight)
        divergence = posterior.kl().float().mean() / images[0].numel()
        loss = rebuilt + KL_WEIGHT * divergence
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        budget.count(count)
        bar.update(count)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{rebuilt.item():.4f}", kl=f"{divergence.item():.2f}", size=side)
        if step % 300 == 0 or budget.progress >= 1:
            save_checkpoint(
                checkpoint,
                vae=vae.state_dict(),
                optimizer=optimizer.state_dict(),
                budget=budget.state_dict(),
                step=step,
            )
            with autocast(device):
                figures, shown = evaluate(vae, validation[:16], args.size, device)
            tqdm.write(f"{budget.samples_done} samples, {budget.seconds_done:.0f} s: {figures}")
            grid(to_images(shown), 8).save(args.out / "roundtrip.png")
    bar.close()

    if not args.freeze_encoder:
        with torch.no_grad():
            images = to_tensor(np.stack([scene_image((scene, args.size)) for scene in validation]), device)
            deviation = vae.encode(images).latent_dist.sample().std().item()
        vae.register_to_config(scaling_factor=1 / deviation)
    vae.save_pretrained(args.out)


if __name__ == "__main__":
    main()
