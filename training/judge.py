"""Train the judge: a small `CLIPModel` that names what a crop shows and matches pictures with captions.

    python -m training.judge --out train_out/judge --seconds 480

It sees 64 px windows of scenes drawn with other seeds than the diffusion model's, colors shifted, blurred and noised
so that it does not take the sprites' exact pixels for the objects. Windows lie around one object (named "a red striped
hat"), anywhere without one ("nothing"), or hold the whole picture (its caption). The loss is CLIP's contrastive one
over the batch, with equal texts counting as one, and the zero-shot cross-entropy over the label prompts.
"""

import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from training.common import (
    Budget,
    arguments,
    autocast,
    held_out_scenes,
    learning_rate,
    pick_device,
    render_all,
    save_checkpoint,
    save_half,
    to_tensor,
)
from training.scenes import COLORS, KINDS, PHRASINGS, RECOLORED, TEXTURES, Object, Scene, random_scene
from training.tokenizer import MAX_LENGTH, write_tokenizer


SIZE = 64
FIRST_SEED = 2 * 10**6  # the diffusion model's scenes are counted from 0, the measuring ones from 10**6
NOTHING = "nothing"
WINDOWS = 4  # per scene: objects and empty places; one more holds the whole scene


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


KIND_PROMPTS = (*(article(kind) for kind in KINDS), NOTHING)


def color_prompts(kind: str) -> list[str]:
    return [article(f"{color} {kind}") for color in COLORS]


def texture_prompts(color: str, kind: str) -> list[str]:
    """Prompts of the plain object and of each texture."""
    return [article(f"{color} {words}") for words in (kind, *(f"{texture} {kind}" for texture in TEXTURES))]


def describe(item: Object) -> str:
    """What a window around the object is called: "a red striped hat"."""
    return article(" ".join((*item.adjectives, item.kind)))


def build(vocabulary: int) -> CLIPModel:
    shared = {"intermediate_size": 512, "num_attention_heads": 4, "hidden_size": 128}
    return CLIPModel(
        CLIPConfig(
            projection_dim=128,
            text_config={
                **shared,
                "num_hidden_layers": 2,
                "vocab_size": vocabulary,
                "max_position_embeddings": MAX_LENGTH,
                "bos_token_id": vocabulary - 2,
                "eos_token_id": vocabulary - 1,
                "pad_token_id": vocabulary - 1,
            },
            vision_config={**shared, "num_hidden_layers": 5, "image_size": SIZE, "patch_size": 8},
        )
    )


# Windows


def window(image: Image.Image, box: tuple[float, float, float]) -> Image.Image:
    """Square part of a picture at (left, top, side), shares of its side, as `SIZE` px; black beyond the edge."""
    left, top, side = (value * image.width for value in box)
    corners = (round(left), round(top), round(left + side), round(top + side))
    return image.crop(corners).resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def object_window(mask: np.ndarray, rng: random.Random | None = None) -> tuple[float, float, float]:
    """Square around a mask, with some margin; jittered if `rng` is given."""
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    top, left, height, width = rows[0], columns[0], np.ptp(rows) + 1, np.ptp(columns) + 1
    margin = rng.uniform(0.95, 1.5) if rng else 1.15
    side = max(height, width) * margin
    shift_x, shift_y = (rng.uniform(-0.12, 0.12) * side if rng else 0 for _ in range(2))
    center_x, center_y = left + width / 2 + shift_x, top + height / 2 + shift_y
    scale = mask.shape[0]
    return (center_x - side / 2) / scale, (center_y - side / 2) / scale, side / scale


def augment(image: Image.Image, rng: random.Random) -> np.ndarray:
    """Color shifts too small to change a color's name, blur and noise as a generated picture may have."""
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.1)))
    pixels = np.asarray(image).astype(np.float32)
    generator = np.random.default_rng(rng.randrange(2**32))
    pixels = pixels * generator.uniform(0.9, 1.08, 3) + generator.uniform(-12, 12)
    pixels = pixels + generator.normal(0, rng.uniform(0, 8), (SIZE, SIZE, 1))
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.clip(pixels, 0, 255).astype(np.uint8)


def examples(job: tuple[int | Scene, bool]) -> list[tuple[np.ndarray, str, tuple[int, int, int]]]:
    """Windows of one scene, as (pixels, text, labels): kind, color and texture, -1 where there is none to tell.

    Args:
        job: a seed or a scene, and whether to augment.
    """
    scene, augmented = job
    rng = random.Random(f"judge {scene}")
    if isinstance(scene, int):
        scene = random_scene(rng, held_out=None)
    drawn = scene.render(128)
    found = []

    def add(box: tuple[float, float, float], text: str, labels: tuple[int, int, int]) -> None:
        part = window(drawn.image, box)
        found.append((augment(part, rng) if augmented else np.asarray(part), text, labels))

    for item, visible in list(zip(scene.objects, drawn.visible, strict=True))[: WINDOWS - 1 if augmented else None]:
        color = list(COLORS).index(item.color) if item.color else -1
        texture = -1 if item.color is None else 1 + TEXTURES.index(item.texture) if item.texture else 0
        labels = KINDS.index(item.kind), color, texture
        if visible.sum() > 30:
            add(object_window(visible, rng if augmented else None), describe(item), labels)
    union = np.any(drawn.full, axis=0)
    while augmented and len(found) < WINDOWS:
        side = rng.uniform(0.2, 0.5)
        left, top = rng.uniform(0, 1 - side), rng.uniform(0, 1 - side)
        rows, columns = (slice(int(start * 128), int((start + side) * 128)) for start in (top, left))
        if union[rows, columns].mean() < 0.12:
            add((left, top, side), NOTHING, (len(KINDS), -1, -1))
        elif rng.random() < 0.05:  # a full picture may have no empty place
            break
    if augmented:
        add((0.0, 0.0, 1.0), scene.caption(rng.randrange(len(PHRASINGS))).text, (-1, -1, -1))
    return found


# Reading


class Judge:
    """A trained judge with its label prompts encoded.

    Every method takes windows: uint8 (n, 64, 64, 3).
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.kinds = self.encode_text(KIND_PROMPTS)
        self.colors = torch.stack([self.encode_text(color_prompts(kind)) for kind in RECOLORED])
        self.textures = {
            kind: torch.stack([self.encode_text(texture_prompts(color, kind)) for color in COLORS])
            for kind in RECOLORED
        }

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "Judge":
        model = CLIPModel.from_pretrained(folder).to(device)
        return cls(model, CLIPTokenizer.from_pretrained(folder))

    @torch.no_grad()
    def encode_text(self, texts) -> torch.Tensor:
        return text_features(self.model, self.tokenizer, list(texts))

    @torch.no_grad()
    def encode(self, windows: np.ndarray, batch: int = 512) -> torch.Tensor:
        """(n, width) unit image embeddings."""
        device = self.model.device
        parts = []
        for first in range(0, len(windows), batch):
            with autocast(device):
                parts.append(image_features(self.model, to_tensor(windows[first : first + batch], device)))
        return torch.cat(parts)

    def probabilities(self, features: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        return (features @ prompts.T * self.model.logit_scale.exp()).softmax(-1)

    def kind(self, features: torch.Tensor) -> torch.Tensor:
        """(n, kinds + 1) probabilities, the last of nothing."""
        return self.probabilities(features, self.kinds)

    def color(self, features: torch.Tensor, kind: str) -> torch.Tensor:
        """(n, colors) probabilities, given the kind."""
        return self.probabilities(features, self.colors[RECOLORED.index(kind)])

    def texture(self, features: torch.Tensor, color: str, kind: str) -> torch.Tensor:
        """(n, 1 + textures) probabilities, plain first, given color and kind."""
        return self.probabilities(features, self.textures[kind][list(COLORS).index(color)])


def image_features(model: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    pooled = model.vision_model(pixel_values=pixels).pooler_output
    return F.normalize(model.visual_projection(pooled).float(), dim=-1)


def text_features(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    # The pooled token is the end of the text, which sees nothing after it: padding need only even out the batch.
    ids = tokenizer(texts, padding=True, max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
    pooled = model.text_model(input_ids=ids.input_ids.to(model.device)).pooler_output
    return F.normalize(model.text_projection(pooled).float(), dim=-1)


def accuracy(judge: Judge, scenes: list[Scene]) -> dict[str, float]:
    """How often the judge names real object windows of scenes right: kinds, colors and textures."""
    right = {"kind": [], "color": [], "texture": []}
    found = [example for parts in map(examples, ((scene, False) for scene in scenes)) for example in parts]
    features = judge.encode(np.stack([pixels for pixels, _, _ in found]))
    kinds = judge.kind(features).argmax(-1)
    for index, (_, _, (kind, color, texture)) in enumerate(found):
        right["kind"].append(kinds[index].item() == kind)
        if color < 0:
            continue
        own, name = features[index : index + 1], KINDS[kind]
        right["color"].append(judge.color(own, name).argmax().item() == color)
        right["texture"].append(judge.texture(own, list(COLORS)[color], name).argmax().item() == texture)
    return {name: float(np.mean(values)) for name, values in right.items()}


def contrastive_loss(images: torch.Tensor, texts: torch.Tensor, same: torch.Tensor, scale: torch.Tensor):
    """CLIP's symmetric loss; `same` (n, n) marks pairs whose texts are equal, which share the target."""
    logits = images @ texts.T * scale
    target = same / same.sum(-1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def given_kind_loss(images: torch.Tensor, prompts: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor):
    """Cross-entropy of images (n, d) against their own prompts (n, choices, d); label -1 has no say."""
    logits = torch.einsum("nd,ncd->nc", images, prompts) * scale
    return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / (labels >= 0).sum().clamp(min=1)


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, "train_out/judge", seconds=480, batch=128, rate=1e-3)
    parser.add_argument("--scenes", type=int, default=12000, help="scenes to draw windows from (%(default)s)")
    parser.add_argument("--measured", type=int, default=300, help="scenes to measure accuracy on (%(default)s)")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(args.out)
    model = build(len(tokenizer)).to(device).train()
    if device.type == "cpu":  # the fused kernel's bf16 backward pass takes twice as long there
        model.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02, betas=(0.9, 0.98), fused=True)
    budget, step = Budget(args.seconds, args.samples), 0
    checkpoint = args.out / "checkpoint.pt"
    if args.resume:
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        budget.load_state_dict(state["budget"])
        step = state["step"]

    jobs = [(FIRST_SEED + args.seed * args.scenes + index, True) for index in range(args.scenes)]
    found = [one for parts in tqdm(render_all(examples, jobs), "drawing", len(jobs)) for one in parts]
    pixels = np.stack([one[0] for one in found])
    texts = [one[1] for one in found]
    labels = torch.tensor([one[2] for one in found], device=device)
    text_ids = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    same_text = torch.tensor([text_ids[text] for text in texts], device=device)
    every_color = [prompt for kind in RECOLORED for prompt in color_prompts(kind)]

    bar = tqdm(desc="judge", unit=" windows", initial=budget.samples_done)
    budget.start()
    while budget.progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.rate, step, budget.progress, args.decay)
        chosen = np.random.default_rng((args.seed, step)).integers(0, len(pixels), args.batch)
        own = torch.as_tensor(chosen, device=device)
        kind, color, texture = labels[own].unbind(-1)
        with autocast(device):
            images = image_features(model, to_tensor(pixels[chosen], device))
            textured = (texture >= 0).nonzero()[:16, 0].tolist()
            texture_texts = [
                prompt
                for index in textured
                for prompt in texture_prompts(list(COLORS)[color[index]], KINDS[kind[index]])
            ]
            captions = text_features(model, tokenizer, [texts[index] for index in chosen])
            embedded = text_features(model, tokenizer, [*KIND_PROMPTS, *every_color, *texture_texts])
            kind_rows, color_rows, texture_rows = embedded.split(
                (len(KIND_PROMPTS), len(every_color), len(texture_texts))
            )
        scale = model.logit_scale.exp().clamp(max=100)
        same = (same_text[own][:, None] == same_text[own]).float()
        contrast = contrastive_loss(images, captions, same, scale)
        kind_loss = F.cross_entropy(images @ kind_rows.T * scale, kind, ignore_index=-1)
        # Of each window, only the prompts with its own kind (and color): which color is it, given what it is?
        recolored = torch.tensor([RECOLORED.index(KINDS[k]) if c >= 0 else 0 for k, c in zip(kind, color, strict=True)])
        color_rows = color_rows.unflatten(0, (len(RECOLORED), len(COLORS)))[recolored.to(device)]
        texture_rows = texture_rows.unflatten(0, (len(textured), 1 + len(TEXTURES)))
        color_loss = given_kind_loss(images, color_rows, color, scale)
        texture_loss = given_kind_loss(images[textured], texture_rows, texture[textured], scale)
        loss = contrast + kind_loss + color_loss + texture_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        budget.count(args.batch)
        bar.update(args.batch)
        if step % 10 == 0:
            terms = {"contrast": contrast, "kind": kind_loss, "color": color_loss, "texture": texture_loss}
            bar.set_postfix({name: f"{term.item():.3f}" for name, term in terms.items()})
        if step % 500 == 0 or budget.progress >= 1:
            save_checkpoint(
                checkpoint,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                budget=budget.state_dict(),
                step=step,
            )
    bar.close()
    model.eval()
    figures = accuracy(Judge(model, tokenizer), held_out_scenes(args.measured))
    (args.out / "accuracy.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(figures)
    save_half(model, args.out)


if __name__ == "__main__":
    main()
