"""Properties of the embedded model's training code: scenes, tokenizer, and a two-step run of every stage."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from training import judge, latents, report, scenes, unet, vae
from training.common import held_out_scenes
from training.scenes import PHRASINGS, WORDS, Scene, is_held_out, random_scene
from training.tokenizer import MAX_LENGTH, caption_tokens, write_tokenizer
from training.unet import grounding_losses
from training.vae import composites


SEEDS = st.integers(0, 10**5)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_a_scene_depends_on_its_seed_alone(seed):
    one, other = (random_scene(random.Random(seed)) for _ in range(2))
    assert one == other
    assert one.render(32).image.tobytes() == other.render(32).image.tobytes()


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_visible_masks_are_disjoint_parts_of_the_full_masks(seed):
    drawn = random_scene(random.Random(seed)).render(64)
    assert sum(mask.astype(int) for mask in drawn.visible).max() <= 1
    for full, visible in zip(drawn.full, drawn.visible, strict=True):
        assert not (visible & ~full).any()
        assert visible.sum() > 0.3 * full.sum()  # named in the caption, so it must be seen


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(0, len(PHRASINGS) - 1))
def test_captions_name_every_object_by_its_words(seed, phrasing):
    scene = random_scene(random.Random(seed))
    caption = scene.caption(phrasing)
    words = [word.strip(",") for word in caption.text.split()]
    assert set(words) <= set(WORDS)
    for item, noun, attributes in zip(scene.objects, caption.nouns, caption.attributes, strict=True):
        assert words[noun] == item.kind
        assert sorted(words[index] for index in attributes) == sorted(item.adjectives)
        assert all(noun - 2 <= index < noun for index in attributes)
    for part in scene.background.split():
        assert part in words


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_a_scene_looks_alike_at_every_size(seed):
    scene = random_scene(random.Random(seed))
    large, small = scene.render(128), scene.render(64)
    shrunk = np.asarray(large.image.reduce(2)).astype(float)
    assert np.abs(shrunk - np.asarray(small.image)).mean() < 8
    for one, other in zip(large.full, small.full, strict=True):
        assert abs(one.mean() - other.mean()) < 0.02


def test_edits_change_the_edited_objects_alone():
    scene = Scene.of("cat", "straw hat", "blue ball", background="on grass", seed=4)
    edited = scene.edited({"hat": "red striped hat"})
    assert edited.caption().text == "a cat wearing a red striped hat and a blue ball on grass"
    before, after = scene.render(128), edited.render(128)
    changed = np.abs(np.asarray(before.image).astype(int) - np.asarray(after.image)).max(-1) > 12
    assert changed.any()
    soft_edge = np.pad(before.full[1], 2)  # a mask is where opacity passes one half: the rim lies outside it
    near = sum(np.roll(soft_edge, (dy, dx), (0, 1)) for dy in range(-2, 3) for dx in range(-2, 3))[2:-2, 2:-2] > 0
    assert not (changed & ~near).any()
    assert scene.edited({0: "dog"}).objects[0].x == scene.objects[0].x
    assert scene.edited({}) == scene


def test_held_out_combinations_stay_out_of_training():
    combinations = [(a, h, c) for a in scenes.ANIMALS for h in scenes.HEADWEAR for c in scenes.COLORS]
    share = np.mean([is_held_out(*combination) for combination in combinations])
    assert 0.08 < share < 0.18
    for seed in range(300):
        assert not random_scene(random.Random(seed)).held_out
    assert random_scene(random.Random(0), held_out=True).held_out


@pytest.mark.parametrize(
    "build",
    [
        lambda: Scene.of("unicycle"),
        lambda: Scene.of("red cat"),
        lambda: Scene.of("white striped ball"),
        lambda: Scene.of("striped ball"),
        lambda: Scene.of("straw cap"),
        lambda: Scene.of("ball", "red hat"),
        lambda: Scene.of("cat", background="on the moon"),
        lambda: Scene.of("cat").find("dog"),
        lambda: Scene.of("cat", "red hat", "dog", "blue hat").edited({"hat": "cap"}),
    ],
)
def test_what_cannot_be_drawn_is_refused(build):
    with pytest.raises(ValueError):
        build()


# Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_every_caption_word_is_one_token(tokenizer):
    for word in (*WORDS, ","):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=12))
def test_any_text_splits_into_known_tokens(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    assert all(0 <= token < len(tokenizer) for token in ids)


def test_case_does_not_matter(tokenizer):
    assert tokenizer("A Cat Wearing a HAT").input_ids == tokenizer("a cat wearing a hat").input_ids


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(0, len(PHRASINGS) - 1))
def test_caption_tokens_are_the_tokenizers_own_and_know_their_objects(tokenizer, seed, phrasing):
    scene = random_scene(random.Random(seed), held_out=None)
    caption = scene.caption(phrasing)
    ids, named = caption_tokens(tokenizer, caption)
    assert ids == tokenizer(caption.text, padding="max_length", max_length=MAX_LENGTH).input_ids
    for index, item in enumerate(scene.objects):
        words = [tokenizer.decode([token]).strip() for token, owner in zip(ids, named, strict=True) if owner == index]
        assert sorted(words) == sorted((item.kind, *item.adjectives))


# Losses


def test_grounding_is_least_for_attention_inside_the_mask():
    masks = torch.zeros(1, 2, 8, 8)
    masks[0, 1, :4] = 1  # token 0 names nothing
    inside = torch.stack([1 - masks[0, 1], masks[0, 1]]).flatten(1).T[None] * 0.5 + 1e-3
    chance = torch.full((1, 64, 2), 0.5)
    for of_map, of_chance in zip(
        grounding_losses({"a": inside}, masks), grounding_losses({"a": chance}, masks), strict=True
    ):
        assert of_map < of_chance
    token_term, _ = grounding_losses({"a": chance}, masks)
    assert token_term == pytest.approx(0.25, abs=1e-4)  # half of the attention lies outside: (1 - 0.5)^2


def test_composites_are_the_other_scene_inside_and_this_one_outside():
    latents, images = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 32, 32)
    masks = torch.zeros(2, 1, 8, 8)
    masks[:, :, 2:6, 2:6] = 1
    gain = torch.tensor([1.0, 2.0])[:, None, None, None]
    mixed, target, weight = composites(latents, images, masks, gain)
    assert torch.equal(mixed[0, :, 0, 0], latents[0, :, 0, 0])
    assert torch.equal(mixed[0, :, 3, 3], latents[1, :, 3, 3])
    assert torch.equal(mixed[1, :, 3, 3], 2 * latents[0, :, 3, 3])
    assert torch.equal(target[0, :, 16, 16], images[1, :, 16, 16])
    assert weight[0, 0, 16, 16] == 1 and weight[1, 0, 16, 16] == 0 and weight[:, 0, 8, 8].sum() == 0


# Stages: two steps of each on tiny sizes, stopped and resumed


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Folder in which every stage of the diffusion model ran for two steps and, resumed, for two more."""
    out = tmp_path_factory.mktemp("train_out")
    tiny = ["--device", "cpu", "--batch", "4"]
    for more in (["--samples", "8"], ["--samples", "16", "--resume"]):
        small = ["--size", "32", "--crop", "16", "--pictures", "8", "--channels", "8", "8", "8", "--measured", "8"]
        vae.main(["--out", str(out / "vae"), *small, *tiny, *more])
    latents.main(["--vae", str(out / "vae"), "--out", str(out / "latents"), "--scenes", "12", *tiny])
    for more in (["--samples", "8"], ["--samples", "16", "--resume"]):
        folders = ["--vae", str(out / "vae"), "--latents", str(out / "latents"), "--out", str(out / "ldm")]
        unet.main([*folders, "--channels", "32", "32", "32", "32", "--grid", "2", *tiny, *more])
    return out


def test_cached_masks_lie_where_their_words_are_drawn(stages):
    cached = latents.Latents(stages / "latents")
    moments, tokens, masks = cached.batch(np.random.default_rng(0), 6)
    assert moments.shape == (6, 8, 8, 8) and masks.shape == (6, MAX_LENGTH, 8, 8)
    scene = random_scene(random.Random(0))
    _, drawn = latents.draw((0, 32, 8))
    assert not drawn[len(scene.objects) :].any()
    for mask, visible in zip(drawn, scene.render(32).visible, strict=False):
        assert mask.mean() / 255 == pytest.approx(visible.mean(), abs=0.01)
    assert (masks.flatten(2).amax(-1) > 0).any(1).all()
    assert tokens.max() < len(WORDS) * 12


def test_a_run_resumes_where_it_stopped_and_logs(stages):
    lines = [json.loads(line) for line in (stages / "ldm" / "log.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [8, 16]
    assert {"loss", "share_4", "ratio_4"} <= lines[0].keys()
    assert len(list((stages / "ldm").glob("samples_*.png"))) == 2


def test_the_exported_folder_is_a_stable_diffusion_pipeline(stages):
    pipe = StableDiffusionPipeline.from_pretrained(stages / "ldm" / "pipeline")  # in plain fp32, as documented
    pipe.set_progress_bar_config(disable=True)
    assert pipe.safety_checker is None
    assert pipe.scheduler.config.prediction_type == "epsilon"
    assert pipe.tokenizer.model_max_length == pipe.text_encoder.config.max_position_embeddings
    images = pipe("a wombat wearing a red hat", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 32, 32, 3) and np.isfinite(images).all()
    with safe_open(stages / "ldm" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}
    # transformers 4 reads these names alone, without a word about what it did not find
    for folder in (stages / "ldm" / "pipeline", Path("emoji_ldm")):
        with safe_open(folder / "text_encoder" / "model.safetensors", "pt") as file:
            assert all(name.startswith("text_model.") for name in file.keys())


def test_a_unet_trained_on_starts_where_the_other_ended(stages, tmp_path):
    folders = ["--vae", str(stages / "vae"), "--latents", str(stages / "latents"), "--out", str(tmp_path)]
    start = stages / "ldm" / "pipeline"
    still = ["--device", "cpu", "--batch", "2", "--samples", "2", "--grid", "1", "--rate", "0"]
    unet.main([*folders, "--init", str(start), *still])
    for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        before, after = (load_file(root / part / f"{file}.safetensors") for root in (start, tmp_path / "pipeline"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    other = tmp_path / "other"
    shutil.copytree(start, other)
    vocabulary = json.loads((other / "tokenizer" / "vocab.json").read_text())
    words = [token for token in vocabulary if token.endswith("</w>")][-2:]
    vocabulary[words[0]], vocabulary[words[1]] = vocabulary[words[1]], vocabulary[words[0]]
    (other / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ValueError, match="another vocabulary"):
        unet.main([*folders, "--init", str(other), *still])


def test_a_decoder_trained_alone_leaves_the_latents_as_they_are(stages, tmp_path):
    small = ["--size", "32", "--crop", "16", "--pictures", "8", "--measured", "8", "--batch", "4", "--device", "cpu"]
    vae.main(["--out", str(tmp_path), "--init", str(stages / "vae"), "--freeze-encoder", "--samples", "8", *small])
    before, after = (AutoencoderKL.from_pretrained(folder) for folder in (stages / "vae", tmp_path))
    assert before.config.scaling_factor == after.config.scaling_factor
    changed = {
        name.split(".")[0]
        for (name, one), other in zip(before.state_dict().items(), after.state_dict().values(), strict=True)
        if not torch.equal(one, other)
    }
    assert changed == {"decoder", "post_quant_conv"}


def test_localisation_leaves_the_unet_as_it_was(stages):
    pipe = StableDiffusionPipeline.from_pretrained(stages / "ldm" / "pipeline")
    before = dict(pipe.unet.attn_processors)
    figures = unet.localisation(pipe.unet, pipe.text_encoder, pipe.vae, pipe.tokenizer, held_out_scenes(2), (500,))
    assert pipe.unet.attn_processors == before
    assert 0 < figures["share_4"] < 1


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Folder of a judge trained for two steps."""
    out = tmp_path_factory.mktemp("judge")
    tiny = ["--device", "cpu", "--batch", "16", "--scenes", "8", "--measured", "4", "--samples", "32"]
    judge.main(["--out", str(out), *tiny])
    return out


def test_the_judge_reads_windows(judged):
    read = judge.Judge.load(judged)
    parts = judge.examples((Scene.of("cat", "red striped hat"), False))
    assert [text for _, text, _ in parts] == ["a cat", "a red striped hat"]
    features = read.encode(np.stack([pixels for pixels, _, _ in parts]))
    for probabilities in (read.kind(features), read.color(features, "hat"), read.texture(features, "red", "hat")):
        assert torch.allclose(probabilities.sum(-1), torch.ones(2), atol=1e-4)


def test_a_picture_is_judged_object_by_object(judged):
    scene = Scene.of("cat", "red hat", "blue striped ball")
    verdicts = report.judge_picture(judge.Judge.load(judged), scene.render(128).image, scene)
    assert len(verdicts) == 3
    assert verdicts[0][1:] == (None, None)  # a cat has no color to be right about
    assert all(value is not None for value in (*verdicts[1], *verdicts[2]))


@pytest.mark.slow
def test_the_report_measures_the_exported_folder_and_leaves_out_a_bad_judge(stages, judged, tmp_path, capsys):
    model = str(stages / "ldm" / "pipeline")
    report.main(
        ["--model", model, "--judge", str(judged), "--out", str(tmp_path), "--steps", "2", "--inversion-steps", "2"]
    )
    table = capsys.readouterr().out
    assert "VAE round trip PSNR" in table and "judge's own accuracy" in table and "present, one" not in table
    assert (tmp_path / "report.md").read_text().strip() == table.strip()
