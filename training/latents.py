"""Draw the training scenes, encode them with the trained autoencoder and keep the result on disk.

    python -m training.latents --vae train_out/vae --out train_out/latents --scenes 40000

The folder holds arrays that `Latents` maps into memory: posterior mean and deviation, visible object masks at latent
resolution, and for every phrasing of the caption its tokens and the object that each token names.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.lib.format import open_memmap
from tqdm import tqdm

from training.common import autocast, pick_device, render_all, to_tensor
from training.scenes import PHRASINGS, random_scene
from training.tokenizer import MAX_LENGTH, caption_tokens, write_tokenizer


MAX_OBJECTS = 4


def shrink(mask: np.ndarray, size: int) -> np.ndarray:
    """Boolean (s, s) -> uint8 (size, size): covered share of each cell, 0-255."""
    cell = mask.shape[0] // size
    return (mask.reshape(size, cell, size, cell).mean((1, 3)) * 255).round().astype(np.uint8)


def draw(job: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(seed, picture size, mask size) -> picture, and masks (MAX_OBJECTS, size, size)."""
    seed, size, mask_size = job
    drawn = random_scene(random.Random(seed)).render(size)
    masks = np.zeros((MAX_OBJECTS, mask_size, mask_size), np.uint8)
    for index, mask in enumerate(drawn.visible):
        masks[index] = shrink(mask, mask_size)
    return np.asarray(drawn.image), masks


class Latents:
    """The arrays that `main` writes, mapped into memory."""

    FIELDS = ("moments", "masks", "tokens", "named")

    def __init__(self, folder: Path) -> None:
        self.moments, self.masks, self.tokens, self.named = (
            np.load(folder / f"{field}.npy", mmap_mode="r") for field in self.FIELDS
        )

    def __len__(self) -> int:
        return len(self.moments)

    def batch(self, rng: np.random.Generator, size: int) -> tuple[torch.Tensor, ...]:
        """Random scenes, each in a random phrasing.

        Returns:
            moments (n, 8, h, w): latent mean and deviation; tokens (n, L); masks (n, L, h, w) in [0, 1]: the visible
            mask of the object that each token names, zero where it names none.
        """
        rows = np.sort(rng.integers(0, len(self), size))
        phrasings = rng.integers(0, self.tokens.shape[1], size)
        named = torch.from_numpy(self.named[rows, phrasings].astype(np.int64))  # (n, L), -1: none
        masks = torch.from_numpy(self.masks[rows])  # (n, MAX_OBJECTS, h, w)
        masks = torch.cat([masks, torch.zeros_like(masks[:, :1])], 1)  # index -1 finds the empty mask
        masks = masks[torch.arange(size)[:, None], named].float() / 255
        tokens = torch.from_numpy(self.tokens[rows, phrasings].astype(np.int64))
        return torch.from_numpy(self.moments[rows]).float(), tokens, masks


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, default=Path("train_out/vae"))
    parser.add_argument("--out", type=Path, default=Path("train_out/latents"))
    parser.add_argument("--scenes", type=int, default=40000, help="number of scenes (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first scene (%(default)s)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    device = pick_device(args.device)

    vae = AutoencoderKL.from_pretrained(args.vae).to(device, memory_format=torch.channels_last).eval()
    tokenizer = write_tokenizer(args.out / "tokenizer")
    size = vae.config.sample_size
    side = size // 2 ** (len(vae.config.block_out_channels) - 1)
    count = args.scenes
    # Written under other names first: a folder left by a broken run is not mistaken for a whole one.
    arrays = {
        "moments": ((count, 8, side, side), np.float16),
        "masks": ((count, MAX_OBJECTS, side, side), np.uint8),
        "tokens": ((count, len(PHRASINGS), MAX_LENGTH), np.int16),
        "named": ((count, len(PHRASINGS), MAX_LENGTH), np.int8),
    }
    files = {
        name: open_memmap(args.out / f"{name}.partial.npy", "w+", dtype, shape)
        for name, (shape, dtype) in arrays.items()
    }
    for index in range(count):
        scene = random_scene(random.Random(args.first + index))
        for phrasing in range(len(PHRASINGS)):
            tokens, named = caption_tokens(tokenizer, scene.caption(phrasing))
            files["tokens"][index, phrasing], files["named"][index, phrasing] = tokens, named

    # Where the encoder itself needs every core, drawing in other processes halves its rate.
    workers = 1 if device.type == "cpu" else None
    drawn = render_all(draw, ((args.first + index, size, side) for index in range(count)), workers)
    bar = tqdm(desc="encoding", total=count, unit=" scenes")
    for first in range(0, count, args.batch):
        pictures, masks = zip(*(next(drawn) for _ in range(min(args.batch, count - first))), strict=True)
        rows = slice(first, first + len(pictures))
        with autocast(device):
            posterior = vae.encode(to_tensor(np.stack(pictures), device)).latent_dist
        files["moments"][rows] = torch.cat([posterior.mean, posterior.std], 1).float().cpu().numpy()
        files["masks"][rows] = np.stack(masks)
        bar.update(len(pictures))
    bar.close()
    for name, file in files.items():
        file.flush()
        (args.out / f"{name}.partial.npy").replace(args.out / f"{name}.npy")


if __name__ == "__main__":
    main()
