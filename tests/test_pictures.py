"""What people bring as a picture or a mask, and what must come of it: the same latents, or a refusal that names it."""

import io
import os

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mde_edit.masks import as_binary_mask
from mde_edit.pictures import on_white, read_pixels

from .conftest import HEIGHT, SOURCE, TARGET, WIDTH, count_unet_calls


SIZES = [(HEIGHT, WIDTH)]


def tagged(image, orientation):
    """The picture as a camera saves it that was held another way: turned pixels, and a tag that says so."""
    turned = {1: None, 3: 2, 6: 2, 8: 4}
    back = {3: PIL.Image.Transpose.ROTATE_180, 6: PIL.Image.Transpose.ROTATE_90, 8: PIL.Image.Transpose.ROTATE_270}
    stored = image.transpose(back[orientation]) if turned[orientation] else image
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, "png", exif=exif)
    return PIL.Image.open(file)


def forms_of_a_picture(image):
    """`image`, (H, W, 3) uint8, in every form that says the same."""
    pil, tensor = PIL.Image.fromarray(image), torch.from_numpy(image).movedim(-1, 0)
    rgba = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
    return {
        "pil": pil,
        **{f"orientation {k}": tagged(pil, k) for k in (3, 6, 8)},
        "RGBA": pil.convert("RGBA"),
        "RGBX": pil.convert("RGBX"),
        "list": [pil],
        "uint8": image,
        "int64": image.astype(np.int64),
        "uint16 of 8 bits": image.astype(np.uint16),
        "16 bits": image.astype(np.uint16) * 257,
        "big-endian": (image.astype(np.uint16) * 257).astype(">u2"),
        "float 0-1": image / 255,
        "float32 0-255": image.astype(np.float32),
        "longdouble": (image / 255).astype(np.longdouble),
        "float -1-1": image / 127.5 - 1,
        "channels first": np.ascontiguousarray(np.moveaxis(image, -1, 0)),
        "alpha": rgba,
        "a batch of one": image[None],
        "negative strides": image[::-1, ::-1][::-1, ::-1],
        "tensor": tensor,
        "tensor, channels last": torch.from_numpy(image),
        "tensor int32": tensor.int(),
        "tensor -1-1": (tensor / 127.5 - 1)[None],
        "tensor with gradient": (tensor / 255).requires_grad_(),
    }


def test_a_picture_is_the_same_in_every_form(pipe, image):
    expected = pipe.prepare_image(image)
    for name, form in forms_of_a_picture(image).items():
        assert torch.allclose(pipe.prepare_image(form), expected, atol=1e-6), name
    resized = pipe.prepare_image(image, 32, 40)
    for name, form in forms_of_a_picture(image).items():
        assert torch.allclose(pipe.prepare_image(form, 32, 40), resized, atol=1e-6), name


def test_gray_pictures_of_every_mode_mean_their_gray(pipe):
    gray = np.tile(np.linspace(0, 255, WIDTH).round().astype(np.uint8), (HEIGHT, 1))
    expected = pipe.prepare_image(PIL.Image.fromarray(gray).convert("RGB"))
    deep = gray.astype(np.uint16) * 257
    palette = PIL.Image.fromarray(gray).quantize(256)
    forms = {
        "L": PIL.Image.fromarray(gray),
        "LA": PIL.Image.fromarray(gray).convert("LA"),
        "I;16": PIL.Image.fromarray(deep),
        "I": PIL.Image.fromarray(deep.astype(np.int32)),
        "F": PIL.Image.fromarray(gray.astype(np.float32) / 255),
        "F of 255": PIL.Image.fromarray(gray.astype(np.float32)),
        "P": palette,
    }
    for name, form in forms.items():
        assert (pipe.prepare_image(form) - expected).abs().max() < 0.01, name


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGBa"])
def test_what_is_transparent_is_white(pipe, mode):
    image = PIL.Image.new("RGBA", (WIDTH, HEIGHT), (255, 0, 0, 0))  # red under full transparency
    image.paste((0, 0, 0, 255), (0, 0, WIDTH // 2, HEIGHT))
    pixels = pipe.prepare_image(image.quantize() if mode == "P" else image.convert(mode))
    assert torch.allclose(pixels[..., WIDTH // 2 :], torch.ones(())), "the hidden color shows"
    assert torch.allclose(pixels[..., : WIDTH // 2], -torch.ones(()))
    half = PIL.Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 128))
    assert pipe.prepare_image(half).mean().item() == pytest.approx(1 - 2 * 128 / 255, abs=1e-3)


def mask_forms(mask):
    """A boolean mask (H, W) in every form that says the same."""
    uint8 = mask.astype(np.uint8) * 255
    pil = PIL.Image.fromarray(uint8)
    layers = {}
    for name, ink in (("black", (0, 0, 0)), ("red", (255, 0, 0)), ("white", (255, 255, 255))):
        layers[f"{name} paint"] = PIL.Image.fromarray(np.dstack([np.full((*mask.shape, 3), ink, np.uint8), uint8]))
    labels = PIL.Image.fromarray(mask.astype(np.uint8) * 3)
    labels.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    gray = PIL.Image.fromarray(1 - mask.astype(np.uint8))  # index 0 is white
    gray.putpalette([255, 255, 255, 0, 0, 0])
    top, bottom = mask.copy(), mask.copy()
    top[HEIGHT // 2 :], bottom[: HEIGHT // 2] = False, False
    return {
        "bool": mask,
        "uint8": uint8,
        "0 and 1": mask.astype(np.int64),
        "uint16": uint8.astype(np.uint16) * 257,
        "float": mask.astype(np.float16),
        "float 255": uint8.astype(np.float32),
        "L": pil,
        "1": pil.convert("1"),
        "RGB": pil.convert("RGB"),
        "RGBA, opaque": pil.convert("RGBA"),
        "I;16": PIL.Image.fromarray(uint8.astype(np.uint16) * 257),
        "F": PIL.Image.fromarray(mask.astype(np.float32)),
        **layers,
        "gray with alpha": PIL.Image.merge("LA", (PIL.Image.new("L", pil.size, 255), pil)),
        "labels": labels,
        "black and white palette": gray,
        "orientation 6": tagged(pil, 6),
        "equal channels": np.repeat(uint8[..., None], 3, -1),
        "channels first": torch.from_numpy(uint8)[None].repeat(3, 1, 1),
        "alpha array": np.dstack([np.zeros((*mask.shape, 3), np.uint8), uint8]),
        "batch and channel": torch.from_numpy(mask)[None, None],
        "list": [top, PIL.Image.fromarray(bottom)],
        "list of sizes": [top, np.kron(bottom, np.ones((1, 1), bool))],
    }


def test_a_mask_is_the_same_in_every_form(masks):
    mask = masks[0] > 0
    for name, form in mask_forms(mask).items():
        assert np.array_equal(as_binary_mask(form, "m", SIZES).numpy() > 0, mask), name


def test_a_list_of_masks_of_other_sizes_is_their_union(masks):
    one, other = masks[0] > 0, masks[1] > 0
    doubled = np.kron(other, np.ones((2, 2), bool))
    union = as_binary_mask([one, doubled], "m", SIZES)
    assert np.array_equal(union.numpy() > 0, np.kron(one, np.ones((2, 2), bool)) | doubled)


def test_a_mask_is_compared_with_its_picture_not_with_rounded_latents(pipe, image, masks):
    """What the picture is resized to, or rounded to, is not what the user drew on."""
    edit = {"optimization_iterations": 0, "output_type": "latent"}
    square = pipe.invert(image, SOURCE, 1, method="direct", height=64, width=64)
    for mask in (masks[0], np.ones((64, 64), bool)):  # drawn on the photo, or on what was inverted
        assert torch.isfinite(pipe(TARGET, square, object_masks={"dog": mask}, **edit).images).all()
    with pytest.raises(ValueError, match="transposed"):
        pipe(TARGET, square, object_masks={"dog": masks[0].T}, **edit)
    flat = np.tile(image[:12], (1, 2, 1))  # 256x12: one row of latents, 21:1 against 32:1
    inverted = pipe.invert(flat, SOURCE, 1, method="direct")
    assert inverted.image_size == (12, 256) and inverted.latents.shape[-2:] == (1, 32)
    pipe(TARGET, inverted, object_masks={"dog": np.ones((12, 256), bool)}, **edit)
    once = {"image": flat, "source_prompt": SOURCE, "num_inference_steps": 1, "inversion_method": "direct"}
    pipe(TARGET, **once, object_masks={"dog": np.ones((12, 256), bool)}, **edit)


def test_the_pictures_size_is_saved_and_older_files_load_without_it(inversion, tmp_path):
    from safetensors.torch import load_file, safe_open, save_file

    inversion.save(tmp_path / "new.safetensors")
    assert type(inversion).load(tmp_path / "new.safetensors").image_size == (HEIGHT, WIDTH)
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        metadata = file.metadata()
    del metadata["image_size"]
    save_file(load_file(tmp_path / "new.safetensors"), tmp_path / "old.safetensors", metadata)
    assert type(inversion).load(tmp_path / "old.safetensors").image_size is None


WRONG_PICTURES = [
    (np.zeros((64, 96), np.uint8), r"has shape \(64, 96\)"),
    (np.zeros((64, 96, 2), np.uint8), r"has shape \(64, 96, 2\)"),
    (np.zeros((2, 64, 96, 3)), r"has shape \(2, 64, 96, 3\)"),
    (np.zeros((0, 96, 3)), "no pixels"),
    (np.zeros((1, 1, 3)), "smaller than one latent"),
    (np.zeros((64, 96, 3), complex), "dtype complex128"),
    (np.full((64, 96, 3), "a"), "dtype <U1"),
    (np.full((64, 96, 3), None), "dtype object"),
    (np.full((64, 96, 3), 3.0), "values from 3 to 3"),
    (np.full((64, 96, 3), 300.0), "values from 300"),
    (np.full((64, 96, 3), -0.5), None),
    (np.full((64, 96, 3), -2.0), "values from -2"),
    (np.full((64, 96, 3), -1), "values from -1"),
    (np.full((64, 96, 3), 70000), "values from 70000"),
    (np.full((64, 96, 3), np.inf), "not finite"),
    (torch.zeros(3, 64, 96, dtype=torch.complex64), "complex64"),
    (torch.zeros(3, 64, 96).to_sparse(), "sparse"),
    (torch.zeros(3, 64, 96, device="meta"), "plain bool"),
    (b"bytes", "is a bytes"),
    ({}, "is a dict"),
    ([], "list of 0"),
    (PIL.Image.new("RGB", (0, 5)), "no pixels"),
    (PIL.Image.new("RGB", (3, 3)), "smaller than one latent"),
]


@pytest.mark.parametrize("picture,message", WRONG_PICTURES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_wrong_picture_is_named(pipe, picture, message):
    if message is None:  # negative floats are diffusers' own range
        assert pipe.prepare_image(picture).max() == -0.5
        return
    with pytest.raises(ValueError, match=message) as caught, count_unet_calls(pipe.unet) as calls:
        pipe.invert(picture, SOURCE)
    assert "`image`" in str(caught.value) and not calls


@pytest.mark.parametrize("name", ["height", "width"])
@pytest.mark.parametrize("value", ["64", -8, 0, 3, 64.5, True, float("nan"), 10**30, [64]])
def test_a_wrong_size_is_named(pipe, image, name, value):
    with pytest.raises(ValueError, match=f"`{name}` is .*whole number"):
        pipe.invert(image, SOURCE, **{name: value})


def test_a_size_may_be_any_librarys_number(pipe, image):
    for size in (np.int64(32), np.float32(32), 32.0, 35):
        assert pipe.prepare_image(image, size, size).shape[-2:] == (32, 32)


WRONG_MASKS = [
    (np.zeros((HEIGHT, WIDTH, 3)) + np.arange(3) / 2, "channels differ"),
    (PIL.Image.new("RGBA", (WIDTH, HEIGHT), (255, 255, 255, 0)), "is empty"),
    (PIL.Image.new("LA", (WIDTH, HEIGHT), (255, 10)), "is empty"),
    (PIL.Image.new("P", (WIDTH, HEIGHT)), "is empty"),
    ([], "empty list"),
    ([np.ones((HEIGHT, WIDTH)), 5], r"\[1\] is a int"),
    (np.ones((HEIGHT, WIDTH), complex), "dtype complex"),
    (np.full((HEIGHT, WIDTH), 2**40), "values from"),
    (torch.ones(0, 5), "no pixels"),
    (np.ones((2, 2, HEIGHT, WIDTH)), "has shape"),
]


@pytest.mark.parametrize("mask,message", WRONG_MASKS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_wrong_mask_is_named(mask, message):
    with pytest.raises(ValueError, match=message) as caught:
        as_binary_mask(mask, "object_masks['dog']", SIZES)
    assert str(caught.value).startswith("object_masks['dog']")


DTYPES = "bool uint8 int8 uint16 int32 int64 uint64 float16 float32 float64 complex64 U2".split()
RANGES = [(0, 1), (0, 255), (-1, 1), (0, 65535), (-(2**40), 2**40), (0, 2), (-0.001, 1.001)]


@st.composite
def arrays(draw):
    """An array of any dtype, shape and range, as numpy or, where it can be, as torch."""
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 17]), max_size=5)))
    dtype = draw(st.sampled_from(DTYPES))
    low, high = draw(st.sampled_from(RANGES))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    with np.errstate(all="ignore"):
        values = rng.uniform(low, high, shape).astype(dtype)
    if draw(st.booleans()) and values.dtype.kind == "f" and values.size:
        values.reshape(-1)[0] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    if draw(st.booleans()) and values.dtype.kind in "biuf" and dtype not in ("uint16", "uint64"):
        return torch.from_numpy(values)
    return values


@given(arrays())
@settings(max_examples=int(os.environ.get("FUZZ", 150)), deadline=None)
def test_any_array_is_read_or_refused_by_name(value):
    for read in (lambda: on_white(read_pixels(value, "`image`")), lambda: as_binary_mask(value, "`image`", [(1, 1)])):
        try:
            pixels = read()
        except ValueError as error:
            assert str(error).startswith("`image`")
        else:
            assert pixels.dtype == torch.float32 and 0 <= pixels.min() <= pixels.max() <= 1


MODES = "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I I;16 F".split()


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pil_is_read(pipe, mode):
    image = PIL.Image.new(mode, (24, 16))
    assert pipe.prepare_image(image).shape == (1, 3, 16, 24)
    if mode not in ("CMYK", "YCbCr"):  # whose zero is not black
        with pytest.raises(ValueError, match="is empty"):
            as_binary_mask(image, "m", [(16, 24)])
