"""Segmenters by their real classes, tiny and random: what goes in and comes out, not how good it is."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from mde_edit.tools.segment import load_segmenter
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTProcessor,
    SamConfig,
    SamModel,
    SamProcessor,
    SwinConfig,
)


transformers = pytest.importorskip("transformers", minversion="5")  # its image processors that need no torchvision

TOKENIZER = Path(__file__).parent.parent / "emoji_ldm" / "tokenizer"
IMAGE = PIL.Image.fromarray((np.random.default_rng(0).random((48, 80, 3)) * 255).astype(np.uint8))
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def text_config(tokenizer, length):
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": length, **ids}


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "output_channels": 16,
        "mlp_dim": 32,
        "global_attn_indexes": [1],
        "window_size": 4,
        "num_pos_feats": 8,
    }
    prompt = {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "iou_head_hidden_dim": 16, "iou_head_depth": 2}
    decoder = {"hidden_size": 16, "mlp_dim": 32, **heads}
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)).eval()
    sides = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    small = {"mask_size": {"longest_edge": 16}, "mask_pad_size": {"height": 16, "width": 16}}
    folder = tmp_path_factory.mktemp("sam")
    model.save_pretrained(folder)
    SamProcessor(transformers.SamImageProcessorPil(**sides, **small)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def owl(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    vision = {**SMALL, "image_size": 64, "patch_size": 16}
    config = OwlViTConfig(text_config=text_config(tokenizer, 16), vision_config=vision, projection_dim=16)
    folder = tmp_path_factory.mktemp("owl")
    OwlViTForObjectDetection(config).save_pretrained(folder)
    side = {"height": 64, "width": 64}
    OwlViTProcessor(transformers.OwlViTImageProcessorPil(size=side, crop_size=side), tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    config = CLIPSegConfig(
        text_config=text_config(tokenizer, 77),
        vision_config={**SMALL, "num_hidden_layers": 4, "image_size": 64, "patch_size": 16},
        projection_dim=16,
        extract_layers=[1, 2, 3],
        reduce_dim=8,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    folder = tmp_path_factory.mktemp("clipseg")
    CLIPSegForImageSegmentation(config).save_pretrained(folder)
    side = {"height": 64, "width": 64}
    CLIPSegProcessor(transformers.ViTImageProcessorPil(size=side), tokenizer).save_pretrained(folder)
    return str(folder)


def is_mask(mask):
    return mask.shape == (48, 80) and mask.dtype == bool and mask.any()


@pytest.fixture(scope="module")
def grounding(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("grounding")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", ".", "?"]
    (folder / "vocab.txt").write_text("\n".join(words))
    text = {**SMALL, "num_hidden_layers": 1, "vocab_size": len(words)}
    small = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 4}
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(image_size=64, **small, out_features=["stage2", "stage3", "stage4"]),
        text_config=BertConfig(**text).to_dict(),
        d_model=32,
        encoder_layers=1,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_layers=2,
        decoder_ffn_dim=16,
        decoder_attention_heads=2,
        num_queries=5,
        max_text_len=16,
    )
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    images = transformers.GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 80})
    GroundingDinoProcessor(images, BertTokenizer(str(folder / "vocab.txt"))).save_pretrained(folder)
    return str(folder)


def test_grounding_dino_reads_words_as_its_own_processor_writes_them(sam, grounding):
    segment = load_segmenter(sam, grounding)
    processor, model = GroundingDinoProcessor.from_pretrained(grounding), segment.detector.model
    inputs = processor(images=IMAGE, text=[["cat"]], return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
    size = {"target_sizes": [IMAGE.size[::-1]], "threshold": 0.0, "text_threshold": 0.0}
    (found,) = processor.post_process_grounded_object_detection(out, inputs.input_ids, **size)
    x0, y0, x1, y1 = found["boxes"][found["scores"].argmax()].int().tolist()
    assert segment.find(IMAGE, "cat") == (max(x0, 0), max(y0, 0), min(x1, IMAGE.width), min(y1, IMAGE.height))


def test_points_and_boxes(sam):
    segment = load_segmenter(sam)
    requests = (
        {"points": [(40, 20)]},
        {"points": [(5, 40)]},
        {"points": [(40, 20), (5, 40)]},
        {"box": (10, 5, 60, 40)},
    )
    masks = [segment(IMAGE, **request) for request in requests]
    assert all(map(is_mask, masks)) and len({mask.tobytes() for mask in masks}) == len(masks)
    assert np.array_equal(segment(IMAGE.convert("RGBA"), points=[(40, 20)]), masks[0])


def test_the_mask_is_the_one_the_model_holds_for_its_best(sam):
    segment = load_segmenter(sam)
    inputs = segment.processor(images=IMAGE, input_points=[[[40.0, 20.0]]], return_tensors="pt")
    with torch.no_grad():
        out = segment.model(pixel_values=inputs["pixel_values"], input_points=inputs["input_points"])
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    masks = segment.processor.post_process_masks(out.pred_masks, *sizes)[0][0]
    best = int(out.iou_scores.flatten().argmax())
    assert np.array_equal(segment(IMAGE, points=[(40, 20)]), masks[best].numpy())
    assert any(not torch.equal(masks[best], mask) for mask in masks)


def test_a_word_is_the_box_of_the_detector(sam, owl):
    segment = load_segmenter(sam, owl)
    segment.threshold = 0.0  # of a random detector
    entries = segment.detector(IMAGE, candidate_labels=["cat"], threshold=0.0)
    boxes = [
        (e["score"], max(e["box"]["xmin"], 0), max(e["box"]["ymin"], 0), e["box"]["xmax"], e["box"]["ymax"])
        for e in entries
    ]
    _, x0, y0, x1, y1 = max(box for box in boxes if box[1] < min(box[3], 80) and box[2] < min(box[4], 48))
    box = x0, y0, min(x1, 80), min(y1, 48)
    assert segment.find(IMAGE, "cat") == box
    assert np.array_equal(segment(IMAGE, word="cat"), segment(IMAGE, box=box))
    segment.threshold = 1.0
    with pytest.raises(ValueError, match=r"finds no 'cat' in the picture \(its best score is 0\.\d+, below 1.0\)"):
        segment(IMAGE, word="cat")


def test_words_in_one_model(clipseg):
    segment = load_segmenter(clipseg)
    with torch.no_grad():  # random logits lie on one side of zero: put it in their midst
        inputs = segment.processor(text=["cat"], images=[IMAGE], padding=True, return_tensors="pt")
        last = [
            p for name, p in segment.model.decoder.named_parameters() if name.endswith("transposed_convolution.bias")
        ]
        last[0] -= segment.model(**inputs).logits.median()
        logits = segment.model(**inputs).logits.view(1, 1, 64, 64)
    mask = segment(IMAGE, word="cat")
    assert is_mask(mask) and not mask.all()
    assert np.array_equal(mask, (F.interpolate(logits, (48, 80), mode="bilinear") > 0)[0, 0].numpy())
    assert not np.array_equal(mask, segment(IMAGE, word="a red hat on grass"))


@pytest.mark.parametrize(
    "request_,message",
    [
        ({}, "one of `points`, `box` and `word`"),
        ({"points": [(1, 1)], "box": (1, 1, 5, 5)}, "one of `points`, `box` and `word`"),
        ({"points": []}, r"`points` is \[\]: pass pixels"),
        ({"points": [(1, 2, 3)]}, "pass pixels"),
        ({"points": [(80, 1)]}, r"`points` has \(80, 1\), outside of the picture \(80x48\)"),
        ({"points": [(1, 1), (1, float("nan"))]}, "outside of the picture"),
        ({"box": (10, 5, 10, 40)}, r"`box` is \(10, 5, 10, 40\): pass \(left, top, right, bottom\)"),
        ({"box": (10, 5, 60, 49)}, "80x48 picture"),
        ({"box": (10, 5, 60)}, "`box` is"),
        ({"word": " "}, "`word` is ' '"),
        ({"word": "cat"}, "SAM does not read words: pass `detector`"),
    ],
    ids=str,
)
def test_what_cannot_be_segmented_is_refused(sam, request_, message):
    with pytest.raises(ValueError, match=message):
        load_segmenter(sam)(IMAGE, **request_)


def test_clipseg_takes_words_alone(clipseg):
    with pytest.raises(ValueError, match="neither points nor boxes: load a SAM"):
        load_segmenter(clipseg)(IMAGE, points=[(1, 1)])
    with pytest.raises(ValueError, match="`detector` goes with a segmenter of boxes"):
        load_segmenter(clipseg, "detector")


def test_an_empty_mask_says_so(sam):
    segment = load_segmenter(sam)
    segment.processor.post_process_masks = lambda masks, *sizes: [torch.zeros(1, 3, 48, 80, dtype=torch.bool)]
    with pytest.raises(ValueError, match=r"finds nothing for \[\(1, 1\)\]: point at the thing"):
        segment(IMAGE, points=[(1, 1)])


def test_a_processor_that_needs_torchvision_says_so(sam, monkeypatch):
    def needs_torchvision(name):
        raise ImportError("Sam2ImageProcessor requires the Torchvision library")

    monkeypatch.setattr("mde_edit.tools.segment.AutoProcessor.from_pretrained", needs_torchvision)
    with pytest.raises(ValueError, match="needs torchvision to read pictures.*facebook/sam-vit-base"):
        load_segmenter(sam)
