"""The blocks for Modular Diffusers: each alone, in sequence, among others; all equal to the pipeline bit for bit."""

import json
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import StableDiffusionPipeline
from mde_edit import MDEEditPipeline
from mde_edit.bundle import imported_modules
from mde_edit.tools import publish
from mde_edit.tools.cli import main

from .conftest import SOURCE, TARGET, make_pipe
from .door_kit import ROOT, run_script
from .loopback_hub import Hub


try:
    from mde_edit.mde_blocks import INPUTS, OUTPUTS, MDEDenoiseStep, MDEEditBlocks
except ImportError as error:
    pytest.skip(f"this diffusers has no Modular Diffusers that the blocks go with: {error}", allow_module_level=True)

from diffusers import ComponentsManager, ModularPipelineBlocks  # noqa: E402
from diffusers.modular_pipelines import InputParam  # noqa: E402
from diffusers.modular_pipelines.mellon_node_utils import MellonPipelineConfig  # noqa: E402


INVERT = {"num_inference_steps": 2, "inversion_method": "direct", "guidance_scale": 3.0}
LOSSES = {"optimization_steps": 0.5, "optimization_iterations": 1}
KEPT = {"output_attention_maps": True, "output_type": "np"}


@pytest.fixture(scope="module")
def model(components, tmp_path_factory):
    """A Stable Diffusion model as anyone saves one, with PNDM's scheduler and no safety checker."""
    folder = tmp_path_factory.mktemp("model")
    StableDiffusionPipeline(**make_pipe(components).components, requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(model):
    pipe = MDEEditPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def inversion(expected):
    return expected[1]


@pytest.fixture(scope="module")
def expected(pipe, asked):
    """What the pipeline makes of `asked`, and the inversion that it starts from."""
    own = {"num_inference_steps": 2, "method": "direct", "guidance_scale": 3.0}
    return pipe(**asked, **KEPT), pipe.invert(asked["image"], SOURCE, **own)


def loaded(blocks, pipe):
    """A modular pipeline of `blocks` with the components of `pipe`, quiet."""
    modular = blocks.init_pipeline()
    modular.update_components(**{name: getattr(pipe, name) for name in modular.component_names})
    modular.set_progress_bar_config(disable=True)
    return modular


@pytest.fixture
def modular(pipe):
    return loaded(MDEEditBlocks(), pipe)


@pytest.fixture(scope="module")
def asked(image, masks):
    """An edit in one call, with a word and a drawn mask."""
    drawn = {"object_masks": {"dog": "cat"}, "attribute_masks": {"red": masks[1]}}
    return {"image": image, "source_prompt": SOURCE, "prompt": TARGET, **drawn, **INVERT, **LOSSES}


def same(state, out):
    maps = zip(state.attention_maps or [], out.attention_maps or [])
    return (
        (state.images == out.images).all()
        and (state.source_images == out.source_images).all()
        and state.losses == out.losses
        and (state.attention_maps is None) == (out.attention_maps is None)
        and all(torch.equal(one[key], other[key]) for one, other in maps for key in other)
    )


def test_the_sequence_does_what_the_pipeline_does(modular, pipe, asked, expected, masks):
    state = modular(**asked, **KEPT)
    assert same(state, expected[0])
    assert torch.equal(state.inversion.latents, expected[1].latents)
    given = {"object_masks": [{"tiger": masks[0]}, None], "attribute_masks": None, "output_type": "np", **LOSSES}
    prompts = {"prompt": ["a tiger wearing a straw hat", TARGET], "guidance_scale": 2.0, "negative_prompt": ["a", "an"]}
    again = modular(inversion=state.inversion, **prompts, **given)
    assert same(again, pipe(inversion=state.inversion, **prompts, **given))


def test_each_block_runs_alone(pipe, asked, inversion, masks):
    blocks = MDEEditBlocks().sub_blocks
    assert loaded(blocks["check"], pipe)(**asked).values.keys() >= set(asked)
    words = {"image": asked["image"], "source_prompt": SOURCE, "negative_prompt": "a big dog"}
    inverted = loaded(blocks["invert"], pipe)(**words, **INVERT, output="inversion")
    assert torch.equal(inverted.latents, inversion.latents) and inverted.negative_prompt == "a big dog"
    assert torch.equal(inverted.null_embeds, pipe.embed("a big dog"))
    found = loaded(blocks["mask"], pipe)(inversion=inversion, object_masks={"dog": ["cat"]}, output="object_masks")
    assert (found["dog"][0] == pipe.generate_mask(inversion, "cat")).all()
    given = {"inversion": inversion, "prompt": TARGET, "object_masks": {"dog": masks[0]}, "output_type": "np", **LOSSES}
    out = pipe(**given)
    assert same(loaded(blocks["edit"], pipe)(**given), out)

    steps = blocks["edit"].sub_blocks
    del given["output_type"]
    prepared = loaded(steps["prepare"], pipe)(**given, output=["run", "edits", "latents"])
    assert prepared["run"].unet is None and torch.equal(prepared["latents"], inversion.source_latents(0))
    denoised = loaded(steps["denoise"], pipe)(**prepared)
    assert denoised.source_record is None and denoised.run.unet is None and denoised.losses == out.losses
    images = loaded(steps["decode"], pipe)(
        latents=denoised.latents, inversion=inversion, output_type="np", output="images"
    )
    assert (images == out.images).all()


def test_what_the_segmenter_is_asked_for(modular, pipe, asked, inversion, masks):
    requests = []

    def segment(image, **request):
        requests.append((image.size, request))
        return masks[0] > 0

    click = {"object_masks": {"dog": [{"points": [(20, 30)]}]}, "attribute_masks": {"red": masks[1]}}
    found = loaded(MDEEditBlocks().sub_blocks["mask"], pipe)(
        image=asked["image"],
        inversion=inversion,
        segmenter=segment,
        **click,
        output=["object_masks", "attribute_masks"],
    )
    assert requests == [(asked["image"].shape[1::-1], {"points": [(20, 30)]})]
    assert found["attribute_masks"]["red"] is masks[1]
    assert (found["object_masks"]["dog"][0] == (masks[0] > 0)).all()
    for changed, message in (
        ({"segmenter": None}, r"object_masks\['dog'\] is .*`segmenter` is None: pass a callable"),
        ({"object_masks": {"dog": {"point": (1, 2)}}}, "ask the segmenter by one of 'points'"),
        ({"image": None, "inversion": inversion, "source_prompt": None}, "pass `image`, at which the segmenter"),
    ):
        with pytest.raises(ValueError, match=message):
            modular(**{**asked, **click, "segmenter": segment, **changed})


def test_a_state_can_be_gone_on_with(modular, pipe, asked, expected):
    state = modular(**{**asked, "image": PIL.Image.fromarray(asked["image"])})
    assert np.array_equal(state.images[0], (expected[0].images[0] * 255).round().astype(np.uint8))
    with pytest.raises(ValueError, match="pass `source_prompt=None` to edit that one, or `inversion=None`"):
        modular(state=state, prompt=TARGET)
    changed = {"prompt": "a big dog wearing a red hat", "source_prompt": None, "output_type": "np"}
    images = modular(state=state, **changed, output="images")
    given = {"object_masks": {"dog": "cat"}, "attribute_masks": asked["attribute_masks"], "output_type": "np", **LOSSES}
    assert (images == pipe(changed["prompt"], state.inversion, **given).images).all()


class Watch(ModularPipelineBlocks):
    """A user's block in the loop: notes what it sees and, at one step, halves the latents."""

    @property
    def inputs(self):
        return [InputParam("watched", type_hint=list, required=True)]

    def __call__(self, components, block_state, i, t):
        block_state.watched.append((i, int(t)))
        if i == 1:
            block_state.latents = block_state.latents * 0.5
        return components, block_state


def test_a_block_in_between(pipe, asked, inversion, masks):
    blocks = MDEEditBlocks()
    blocks.sub_blocks["edit"].sub_blocks["denoise"].sub_blocks.insert("watch", Watch(), 2)
    assert {"watched"} == set(blocks.input_names) - set(MDEEditBlocks().input_names)
    given = {"inversion": inversion, "prompt": TARGET, "object_masks": {"dog": masks[0]}, "output_type": "np", **LOSSES}
    watched = []
    images = loaded(blocks, pipe)(**given, watched=watched, output="images")

    def halve(pipe, i, t, tensors):
        return {"latents": tensors["latents"] * 0.5} if i == 1 else None

    assert (images == pipe(**given, callback_on_step_end=halve).images).all()
    assert watched == list(enumerate(inversion.timesteps.tolist()))


def test_everything_is_declared_and_described():
    def all_blocks(block):
        yield block
        for part in block.sub_blocks.values():
            yield from all_blocks(part)

    names = set()
    for block in all_blocks(MDEEditBlocks()):
        names |= {*block.input_names, *block.intermediate_output_names}
        assert len(block.description) > 30 and "TODO" not in block.doc
        assert len(set(block.input_names)) == len(block.input_names)
    assert names == {*INPUTS, *OUTPUTS}
    assert MDEEditBlocks().component_names == ["vae", "text_encoder", "tokenizer", "unet", "scheduler"]
    assert MDEDenoiseStep().component_names == ["unet"]


def test_bad_input_is_refused_before_any_pass(modular, pipe, asked, inversion):
    def no_pass(*args, **kwargs):
        raise AssertionError("a pass")

    pipe.vae.encode, real = no_pass, pipe.vae.encode
    try:
        for changed, message in (
            ({"image": None}, "Pass either `inversion`"),
            ({"prompt": None}, "Required input 'prompt' is missing"),
            ({"object_masks": {"fox": asked["attribute_masks"]["red"]}}, "fox"),
            ({"object_masks": {"dog": "horse"}}, r"object_masks\['dog'\] names no word of the source prompt"),
            ({"object_masks": "cat"}, "`object_masks` is a str"),
            ({"step_size": -1}, "`step_size` is -1"),
            ({"output_type": "png"}, "`output_type` is 'png'"),
            ({"num_inner_steps": 0}, "`num_inner_steps` is 0"),
            ({"image": [asked["image"]] * 2, "prompt": [TARGET] * 2}, "blocks invert one picture at a time"),
            ({"inversion": inversion}, "pass `source_prompt=None`"),
        ):
            with pytest.raises(ValueError, match=message):
                modular(**{**asked, **changed})
    finally:
        pipe.vae.encode = real
    bare = MDEEditBlocks().init_pipeline()
    with pytest.raises(ValueError, match="MDECheckStep uses vae, .*not loaded yet: call `pipe.load_components"):
        bare(**asked)


def test_components_manager_moves_the_models_for_the_blocks(model, asked, expected, monkeypatch):
    """On a CPU there is nothing to be moved to: what is seen is that each model's hook runs, and the result."""
    pytest.importorskip("accelerate")
    # no memory is free, so that each model displaces the others
    monkeypatch.setattr(torch.cpu, "mem_get_info", lambda *device: (0, 0), raising=False)
    manager = ComponentsManager()
    modular = MDEEditBlocks().init_pipeline(str(model), components_manager=manager)
    modular.load_components()
    manager.enable_auto_cpu_offload(device="cpu")
    modular.set_progress_bar_config(disable=True)
    calls = []
    for hook in manager.model_hooks:
        move = hook.hook.pre_forward
        hook.hook.pre_forward = lambda module, *args, move=move, **kwargs: (
            calls.append(type(module).__name__),
            move(module, *args, **kwargs),
        )[1]
    images = modular(**asked, output_type="np", output="images")
    assert set(calls) == {"AutoencoderKL", "CLIPTextModel", "UNet2DConditionModel"}
    # not bit for bit: weights that were moved lie elsewhere in memory, and are summed in another order
    assert np.abs(images - expected[0].images).max() < 1e-3


def test_mellon_nodes_can_be_made():
    """Numbers that an inversion brings are no number fields: Mellon fills an empty one with 0."""
    config = MellonPipelineConfig.from_custom_block(MDEEditBlocks())
    params = config.node_params["custom"]["params"]
    assert params["image"]["type"] == "image" and params["prompt"]["display"] == "textarea"
    assert params["guidance_scale"]["type"] == "custom" and params["step_size"]["default"] == 1.0
    assert {"images", "source_images"} <= set(params)


def test_the_blocks_folder_loads_and_edits_as_the_package(model, asked, expected, masks, tmp_path, monkeypatch, capsys):
    """`make blocks`, `push --blocks` and what a user then does, in a process that has no `mde_edit`."""
    assert main(["bundle", "--blocks", "--out", str(tmp_path / "blocks")]) == 0
    files = publish.files_of_blocks(ROOT)
    assert {path.name: path.read_bytes() for path in (tmp_path / "blocks").iterdir()} == files
    assert sorted(files) == ["LICENSE", "README.md", "mde_blocks.py", "modular_config.json"]
    config = json.loads(files["modular_config.json"])
    assert config["auto_map"] == {"ModularPipelineBlocks": "mde_blocks.MDEEditBlocks"}
    assert not any(module.name == "mde_blocks.py" for module in imported_modules(ROOT / "pipeline.py"))

    hub = Hub()
    hub.add("user/sd", model)
    np.savez(tmp_path / "asked.npz", image=asked["image"], mask=masks[1])
    script = f"""
import sys
sys.modules["mde_edit"] = None
from diffusers import ModularPipelineBlocks
try:
    ModularPipelineBlocks.from_pretrained("user/mde-edit-blocks")
except ValueError as error:
    print("refused", "trust_remote_code=True" in str(error))
blocks = ModularPipelineBlocks.from_pretrained("user/mde-edit-blocks", trust_remote_code=True)
blocks.save_pretrained("again")
blocks = ModularPipelineBlocks.from_pretrained("again", trust_remote_code=True)
pipe = blocks.init_pipeline("user/sd")
pipe.load_components()
saved = np.load("asked.npz")
drawn = dict(object_masks={{"dog": "cat"}}, attribute_masks={{"red": saved["mask"]}})
settings = { ({**INVERT, **LOSSES})!r}
images = pipe(
    image=saved["image"], source_prompt=SOURCE, prompt=TARGET, **drawn, **settings, output_type="np", output="images"
)
np.save("images.npy", images)
"""
    with hub.running():
        hub.stand_in(monkeypatch)
        assert main(["push", "user/mde-edit-blocks", "--blocks", "--dry-run"]) == 0
        assert not hub.requests and "4 files" in capsys.readouterr().out
        assert main(["push", "user/mde-edit-blocks", "--blocks"]) == 0
        assert hub.repos["models", "user/mde-edit-blocks"] == files
        printed, _ = run_script(script, tmp_path / "home", tmp_path, hub)
    assert printed == {"refused": "True"}
    assert (np.load(tmp_path / "images.npy") == expected[0].images).all()
    for other in (["--space"], ["--with-model", "emoji_ldm"]):
        assert main(["push", "user/x", "--blocks", *other]) == 2


def test_without_modular_diffusers_the_command_says_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "mde_edit.mde_blocks", None)
    assert main(["bundle", "--blocks", "--out", str(tmp_path)]) == 2
    assert "The blocks need diffusers 0.37 or newer" in capsys.readouterr().err
