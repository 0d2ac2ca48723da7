"""What the page does, without the page: words proposed, pictures fitted, edits told step by step and repeated."""

import inspect
import pickle
import runpy
import shlex
import unicodedata

import numpy as np
import PIL.Image
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mde_edit import MDEEditPipeline
from mde_edit.tools.edit import report
from mde_edit.tools.options import OPTIONS, read_arguments
from mde_edit.tools.studio import (
    ATTRIBUTE,
    OBJECT,
    SETTING_NAMES,
    SHOWN,
    Progress,
    Studio,
    as_command,
    as_python,
    check_settings,
    mask_file,
    write_regions,
)

from .conftest import SOURCE, TARGET, make_pipe


USUAL = {name: OPTIONS["edit"][name].default for name in SHOWN}
QUICK = {**USUAL, "method": "direct", "steps": 4, "guidance_scale": 3.0, "optimization_iterations": 1}


@pytest.fixture
def studio(pipe):
    return Studio(pipe, "model")


@pytest.fixture
def picture(studio, image):
    return studio.fit(PIL.Image.fromarray(image))


@pytest.fixture
def regions(picture):
    dog, red = np.zeros((2, picture.height, picture.width), bool)
    dog[16:48, 16:48], red[8:24, 24:56] = True, True
    return {(OBJECT, "dog"): dog, (ATTRIBUTE, "red"): red}


@pytest.mark.parametrize(
    "source, target, objects, attributes",
    [
        (SOURCE, TARGET, ["dog"], ["red"]),
        ("a cat and a dog on grass", "a dog and a tiger on grass", ["dog", "tiger"], []),
        ("an orange ball and a cat at the beach", "a blue ball and a panda at the beach", ["panda"], ["blue"]),
        ("a cat", "a striped dog", ["dog"], ["striped"]),
        ("a cat and a dog", "a tiger and a tiger", ["tiger:0", "tiger:1"], []),
        ("a cat", "a cat", [], []),
        ("a cat", "a cat wearing a big, old hat", ["hat"], ["old"]),  # a comma ends a phrase, so "big" is one, too
    ],
)
def test_new_words_are_proposed(studio, source, target, objects, attributes):
    proposed = studio.propose(source, target)
    if "big" in target:
        objects = ["big", *objects]
    assert proposed == (objects, attributes)
    for word in (*objects, *attributes):
        studio.check_word(target, word)


@pytest.mark.parametrize(
    "source, target, word, expected",
    [
        (SOURCE, TARGET, "dog", "cat"),
        (SOURCE, TARGET, "red", "straw hat"),
        (SOURCE, TARGET, "red hat", "straw hat"),
        ("a cat and a cat", "a cat and a dog", "dog", "cat:1"),
        ("a cat", "a cat wearing a hat", "hat", None),
        (SOURCE, TARGET, "zebra", None),
    ],
)
def test_what_a_new_word_is_now_is_proposed(studio, source, target, word, expected):
    assert studio.propose_source(source, target, word) == expected
    if expected:
        studio.check_word(source, expected)


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (50, 50), (3000, 1000), (33, 97)])
def test_a_picture_is_edited_at_the_models_own_area(studio, size):
    picture = studio.fit(PIL.Image.new("RGB", size))
    factor, trained = studio.pipe.vae_scale_factor, studio.pipe.unet.config.sample_size
    assert all(side % factor == 0 for side in picture.size)
    assert picture.width * picture.height == pytest.approx((trained * factor) ** 2, rel=0.15)
    assert picture.width / picture.height == pytest.approx(size[0] / size[1], rel=0.15)


def test_what_is_transparent_is_white(studio):
    assert np.asarray(studio.fit(PIL.Image.new("RGBA", (64, 64), (255, 0, 0, 0)))).min() == 255
    with pytest.raises(ValueError, match="no picture yet"):
        studio.fit(None)


def test_an_edit_tells_how_far_it_is_and_equals_the_pipelines(studio, picture, regions):
    inversion, _ = studio.invert(picture, SOURCE, QUICK)
    request = studio.request(picture, SOURCE, TARGET, regions, QUICK)
    *told, edited = studio.edit(request, inversion, studio.check(request), previews=3)
    assert [(p.step, p.steps) for p in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(isinstance(p, Progress) for p in told) and told.pop().preview is None
    assert all(p.preview.size == picture.size for p in told)
    masks = {"object_masks": {"dog": regions[OBJECT, "dog"]}, "attribute_masks": {"red": regions[ATTRIBUTE, "red"]}}
    settings = {name: QUICK[name] for name in SETTING_NAMES}
    again = studio.pipe(TARGET, inversion=inversion, guidance_scale=QUICK["guidance_scale"], **masks, **settings)
    assert np.array_equal(edited.output.images[0], again.images[0])
    assert report(request, edited, inversion)["guidance_iterations"] == len(again.losses[0]) > 0


class Elsewhere:
    """Stands for ZeroGPU: what is wrapped runs in another process, to and from which everything is pickled."""

    running = False

    def __call__(self, function):
        def call(*arguments):
            result = self.run(function, *pickle.loads(pickle.dumps(arguments)))
            return self.iterate(result) if inspect.isgenerator(result) else pickle.loads(pickle.dumps(result))

        return call

    def run(self, function, *arguments):
        self.running = True
        try:
            return function(*arguments)
        finally:
            self.running = False

    def iterate(self, parts):
        self.running = True  # between its parts, too: what makes them goes on meanwhile
        try:
            for part in parts:
                yield pickle.loads(pickle.dumps(part))
        finally:
            self.running = False


def test_models_are_used_in_what_can_run_in_another_process_alone(pipe, picture, regions):
    elsewhere = Elsewhere()

    def outcome(studio):
        request = studio.request(picture, SOURCE, TARGET, {**regions, (OBJECT, "hat"): "word:hat"}, QUICK)
        masks = studio.check(request)
        inversion, reconstruction = studio.invert(picture, SOURCE, QUICK)
        found = studio.find(inversion, "cat")
        *told, edited = studio.edit(request, inversion, masks)
        report(request, edited, inversion)
        return found, reconstruction, *(p.preview for p in told), edited.output.images[0]

    def check(*_):
        assert elsewhere.running

    expected = outcome(Studio(pipe, "model"))
    models = (pipe.unet, pipe.text_encoder, pipe.vae.encoder, pipe.vae.decoder)
    hooks = [model.register_forward_pre_hook(check) for model in models]
    try:
        found = outcome(Studio(pipe, "model", on_accelerator=elsewhere))
    finally:
        for hook in hooks:
            hook.remove()
    assert all(np.array_equal(one, other) for one, other in zip(expected, found, strict=True))


def test_an_edit_that_nobody_waits_for_ends(studio, picture, regions):
    inversion, _ = studio.invert(picture, SOURCE, QUICK)
    steps = []
    unet, record = studio.pipe.unet, lambda module, args, kwargs: steps.append(1)
    request = studio.request(picture, SOURCE, TARGET, regions, QUICK)
    masks = studio.check(request)
    hook = unet.register_forward_pre_hook(record, with_kwargs=True)
    running = studio.edit(request, inversion, masks, previews=3)
    next(running)
    running.close()
    stopped = len(steps)
    list(studio.edit(request, inversion, masks, previews=3))
    hook.remove()
    assert stopped < 0.8 * (len(steps) - stopped)


def test_what_the_pipeline_refuses_is_raised_where_it_is_waited_for(studio, picture, regions):
    inversion, _ = studio.invert(picture, SOURCE, QUICK)
    request = studio.request(picture, SOURCE, TARGET, regions, QUICK)
    with pytest.raises(ValueError, match="'zebra' is not in the prompt"):
        list(studio.edit(request, inversion, [[{"zebra": regions[OBJECT, "dog"]}], [{}]]))
    for wrong, message in (
        ({(OBJECT, "zebra"): regions[OBJECT, "dog"]}, "'zebra' is not in the prompt"),
        ({(OBJECT, "dog"): regions[OBJECT, "dog"] & False}, r"object_masks\['dog'\] is empty"),
        ({(OBJECT, "dog"): "word:zebra"}, "'zebra' is not in the prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            studio.check(studio.request(picture, SOURCE, TARGET, wrong, QUICK))


@given(st.lists(st.text(min_size=1), min_size=2, max_size=2, unique=True))
@example(["a b", "a_b"])
@example(["a:1", "a_1"])
@example(["Dog", "dog"])
@example(["\u00e9", "e\u0301"])  # of one look
@example(["a-62-", "ab"])
@example(["x" * 300, "x" * 301])
def test_no_two_words_share_a_file(words):
    names = [mask_file(OBJECT, word) for word in words]
    assert len({unicodedata.normalize("NFKD", name).casefold() for name in names}) == 2
    for name in names:
        assert not set(name) & set('/\\:*?"<>|\0 ') and len(name.encode()) < 255


@pytest.mark.parametrize(
    "changed", [{}, {"method": "null_text", "steps": 2, "seed": 3, "eta": 0.5, "max_update": None, "ccl_weight": 0.3}]
)
def test_the_script_and_the_command_say_the_same_edit(
    studio, components, picture, regions, changed, tmp_path, monkeypatch
):
    settings = check_settings({**QUICK, **changed})
    inversion, _ = studio.invert(picture, SOURCE, settings)
    request = studio.request(picture, SOURCE, TARGET, regions, settings)
    *_, edited = studio.edit(request, inversion, studio.check(request))
    write_regions(tmp_path, regions)
    picture.save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edit.py").write_text(as_python(request.args))
    monkeypatch.setattr(MDEEditPipeline, "from_pretrained", lambda model: make_pipe(components))
    runpy.run_path("edit.py")
    assert np.array_equal(PIL.Image.open("edited.png"), edited.output.images[0])

    command = shlex.split(as_command(request.args).replace("\\\n", ""))
    args = vars(read_arguments(command[1:]))
    assert {name: args[name] for name in SHOWN} == settings
    asked = vars(request.args)  # what the page edits is what its command asks for
    assert {name: args[name] for name in asked} == {**asked, "out": "edit"}


def test_settings_are_checked_by_the_command_lines_rules():
    assert check_settings({"steps": 20.0, "negative_prompt": " ", "max_update": None, "seed": None}) == {
        "steps": 20,
        "negative_prompt": None,
        "max_update": None,
        "seed": None,
    }
    for name, value in (
        ("steps", 0),
        ("steps", None),
        ("eta", 2),
        ("ccl_form", "none"),
        ("optimization_iterations", 1.5),
    ):
        with pytest.raises(ValueError, match=f"`{name}`"):
            check_settings({name: value})
