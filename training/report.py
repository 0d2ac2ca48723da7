"""Measure an embedded model and print the table of its card.

    python -m training.report --model emoji_ldm --judge emoji_judge

Everything is measured on held-out seeds. Without a judge that meets its own aims on real windows, the figures that
depend on it are left out: a bad judge says nothing.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from mde_edit import MDEEditPipeline
from PIL import Image
from tqdm import tqdm

from training.common import grid, held_out_scenes, psnr, to_images, to_tensor
from training.judge import Judge, accuracy, window
from training.scenes import COLORS, KINDS, TEXTURES, Scene
from training.unet import GRID_CAPTIONS, localisation
from training.vae import evaluate


JUDGE_AIMS = {"kind": 0.98, "color": 0.97, "texture": 0.95}
WINDOW_SIDES = (0.22, 0.3, 0.4, 0.52, 0.68)


def windows(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Windows of five sizes all over a picture: pixels (n, 64, 64, 3) and boxes (n, 3) of left, top and side."""
    boxes = []
    for side in WINDOW_SIDES:
        places = np.linspace(-0.04, 1.04 - side, round((1.08 - side) / (side / 3)) + 1)
        boxes += [(left, top, side) for top in places for left in places]
    return np.stack([np.asarray(window(image, box)) for box in boxes]), np.array(boxes)


def judge_picture(judge: Judge, image: Image.Image, scene: Scene) -> list[tuple[bool, bool | None, bool | None]]:
    """(present, color right, texture right) for every object of the scene; None where the words name none.

    An object is present if some window is named its kind, more than half sure. Headwear is sought at its wearer's
    place only, so that two hats of one picture are not taken for each other.
    """
    pixels, boxes = windows(image)
    features = judge.encode(pixels)
    kinds = judge.kind(features).cpu().numpy()
    center, side = boxes[:, 0] + boxes[:, 2] / 2, boxes[:, 2]
    verdicts, best = [], {}
    for index, item in enumerate(scene.objects):
        score = kinds[:, KINDS.index(item.kind)].copy()
        if item.worn_by is not None and item.worn_by in best:
            wearer = best[item.worn_by]
            score[np.abs(center - center[wearer]) > 0.5 * side[wearer]] = 0
        best[index] = int(score.argmax())
        present = bool(score.max() > 0.5)
        color = texture = None
        if item.color is not None:
            weights = torch.from_numpy(score / score.sum())  # every window has a say, by how sure it is of the kind
            shown = weights @ judge.color(features, item.kind).cpu()
            color = present and list(COLORS)[shown.argmax()] == item.color
            shown = weights @ judge.texture(features, item.color, item.kind).cpu()
            texture = present and (None, *TEXTURES)[shown.argmax()] == item.texture
        verdicts.append((present, color, texture))
    return verdicts


def rate(values: list[bool | None]) -> float:
    values = [value for value in values if value is not None]
    return 100 * float(np.mean(values)) if values else float("nan")


def generate(pipe: StableDiffusionPipeline, captions: list[str], steps: int, seed: int, batch: int = 16) -> list:
    pictures = []
    for first in tqdm(range(0, len(captions), batch), "sampling"):
        part = captions[first : first + batch]
        generators = [torch.Generator().manual_seed(seed + first + index) for index in range(len(part))]
        pictures += pipe(part, num_inference_steps=steps, guidance_scale=4.0, generator=generators).images
    return pictures


def composition(pipe, judge: Judge, count: int, steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """Judge's figures on generated pictures, and the same figures on the real ones: the most that can be reached."""
    made, real = {}, {}
    sets = {
        "one": held_out_scenes(count, 10**6, groups=1),
        "two": held_out_scenes(count, 11 * 10**5, groups=2),
        "three": held_out_scenes(count, 12 * 10**5, groups=3),
        "unseen": held_out_scenes(count, 13 * 10**5, held_out=True),
        "seen": held_out_scenes(count, 14 * 10**5, groups=None),
    }
    bound = {"made": [], "real": []}
    for name, scenes in sets.items():
        captions = [scene.caption(index).text for index, scene in enumerate(scenes)]
        drawn = [scene.render(128).image for scene in scenes]
        for kind, figures, pictures in (
            ("made", made, generate(pipe, captions, steps, seed=0)),
            ("real", real, drawn),
        ):
            verdicts = [judge_picture(judge, picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
            flat = [verdict for picture in verdicts for verdict in picture]
            figures[f"present, {name}"] = rate([present for present, _, _ in flat])
            attributes = [value for _, *pair in flat for value in pair]
            figures[f"bound, {name}"] = rate(attributes)
            bound[kind] += attributes
    made["bound"], real["bound"] = rate(bound["made"]), rate(bound["real"])
    return made, real


def inversion_loss(pipe: StableDiffusionPipeline, scenes: list[Scene], steps: int) -> float:
    """dB that a null-text reconstruction lies below the autoencoder's round trip, mean over scenes."""
    pipe = MDEEditPipeline.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    size, losses = pipe.vae.config.sample_size, []
    for scene in tqdm(scenes, "inverting"):
        image = scene.render(size).image
        pixels = to_tensor(np.array(image)[None])
        ends = [
            pipe.invert(image, scene.caption().text, steps, method, 1.5).latents[-1:]
            for method in ("direct", "null_text")
        ]
        with torch.no_grad():
            floor, rebuilt = (
                psnr(pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample, pixels).item()
                for latents in ends
            )
        losses.append(floor - rebuilt)
    return float(np.mean(losses))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("emoji_ldm"))
    parser.add_argument("--judge", type=Path, default=Path("emoji_judge"))
    parser.add_argument("--count", type=int, default=64, help="captions per set (%(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="sampling steps (%(default)s)")
    parser.add_argument("--inversion-steps", type=int, default=50, help="of null-text inversion (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("model_report"), help="folder of figures and grids")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = StableDiffusionPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    rows: list[tuple[str, str, str]] = []
    scenes = held_out_scenes(64)

    figures, shown = evaluate(pipe.vae, scenes, pipe.vae.config.sample_size, pipe.device)
    grid(to_images(shown), 8).save(args.out / "roundtrip.png")
    rows.append(("VAE round trip PSNR, dB", f"{figures['psnr']:.1f}", ">= 32"))
    rows.append(("background lost to an edit's latents, dB", f"{figures['background_loss_edit']:.2f}", "<= 1"))
    background = " / ".join(f"{figures[f'background_loss_{name}']:.1f}" for name in ("scene", "double", "noise"))
    rows.append(("... to another scene's / twice those / noise, dB", background, ""))

    found = localisation(pipe.unet, pipe.text_encoder, pipe.vae, pipe.tokenizer, scenes[:32])
    finest = max(int(name.removeprefix("share_")) for name in found if name.startswith("share_"))
    at = f"word attention at {finest}x{finest}"
    rows.append((f"{at}: share in mask", f"{found[f'share_{finest}']:.2f}", ">= 0.7"))
    rows.append((f"{at}: share / area", f"{found[f'ratio_{finest}']:.1f}", ">= 4"))

    lost = inversion_loss(pipe, scenes[:8], args.inversion_steps)
    rows.append(("null-text reconstruction below the VAE floor, dB", f"{lost:.2f}", "<= 1"))
    start = time.perf_counter()
    pipe(GRID_CAPTIONS[0], num_inference_steps=50)
    seconds = time.perf_counter() - start
    rows.append((f"one 50-step sample, {torch.get_num_threads()} threads, s", f"{seconds:.1f}", "<= 15"))

    pictures = generate(pipe, list(GRID_CAPTIONS), args.steps, seed=0)
    grid(pictures, 8, list(GRID_CAPTIONS)).save(args.out / "samples.png")

    if args.judge.is_dir():
        judge = Judge.load(args.judge)
        own = accuracy(judge, held_out_scenes(200))
        for name, aim in JUDGE_AIMS.items():
            rows.append((f"judge's own accuracy, {name}, %", f"{100 * own[name]:.1f}", f">= {100 * aim:.0f}"))
        if all(own[name] >= aim for name, aim in JUDGE_AIMS.items()):
            made, real = composition(pipe, judge, args.count, args.steps)
            aims = {"present, one": ">= 97", "present, two": ">= 93", "present, three": ">= 85", "bound": ">= 92"}
            for name, value in made.items():
                rows.append((f"{name}, % (real pictures)", f"{value:.1f} ({real[name]:.1f})", aims.get(name, "")))
    width = max(len(name) for name, _, _ in rows)
    lines = [f"| {name:{width}} | {value:>22} | {aim:>8} |" for name, value, aim in rows]
    header = f"| {'figure':{width}} | {'measured':>22} | {'aim':>8} |\n|{'-' * (width + 2)}|{'-' * 24}|{'-' * 10}|"
    table = "\n".join((header, *lines))
    print(table)
    (args.out / "report.md").write_text(table + "\n")
    (args.out / "report.json").write_text(json.dumps({name: value for name, value, _ in rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
