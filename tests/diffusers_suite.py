"""diffusers' own pipeline tests, run on MDEEditPipeline: `python tests/diffusers_suite.py PATH_TO_DIFFUSERS_CHECKOUT`.

Both generations of its mixins, on components as small as its own; nothing of them is kept here. What cannot pass is in
`REASONS`, and anything else that fails (or one of those that passes) ends with exit code 1. Further arguments go to
pytest: `-k batch`.
"""

import os
import sys
import tempfile
import unittest
from functools import cache
from pathlib import Path
from unittest import mock


def main() -> int:
    checkout, *rest = sys.argv[1:]
    sys.path[:0] = [checkout, str(Path(__file__).parent)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SUITE_FOLDER"] = folder
        file = Path(folder) / "test_mde_edit.py"
        file.write_text("from diffusers_suite import *\n")
        outcomes = Outcomes()
        # none of pytest's settings and conftests, of either repository
        alone = ["-c", os.devnull, "--rootdir", folder, "--noconftest", "-p", "no:cacheprovider", "-W", "ignore"]
        short = ["-q", "--tb=line", "-rN", "--show-capture=no"]
        code = pytest.main([str(file), *alone, *short, *rest], plugins=[outcomes])
    return outcomes.report() if code in (0, 1) else int(code)


if __name__ == "__main__" and len(sys.argv) < 2:
    sys.exit(__doc__)
if __name__ == "__main__":
    # before `tests` is imported below: the checkout's, not this folder's
    sys.path[:0] = [sys.argv[1], str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from conftest import make_tokenizer  # noqa: E402
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from mde_edit import MDEEditPipeline  # noqa: E402
from peft import LoraConfig  # noqa: E402
from tests.lora.utils import PeftLoraLoaderMixinTests  # noqa: E402
from tests.pipelines import test_pipelines_common as old  # noqa: E402
from tests.pipelines import testing_utils as new  # noqa: E402
from tests.pipelines.pipeline_params import TEXT_TO_IMAGE_CALLBACK_CFG_PARAMS, TEXT_TO_IMAGE_PARAMS  # noqa: E402
from tests.pipelines.stable_diffusion import ip_adapter_tester  # noqa: E402
from tests.pipelines.stable_diffusion import test_stable_diffusion as stable_diffusion  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402


# A failing test's name, or its class -> why it fails.
REASONS = {
    **dict.fromkeys(["TestNewIPAdapter", "TestOldIPAdapter"], "needs an IP-Adapter, which is refused"),
    **dict.fromkeys(
        [
            "test_stable_diffusion_ddim",
            "test_stable_diffusion_ddim_factor_8",
            "test_stable_diffusion_k_euler",
            "test_stable_diffusion_k_euler_ancestral",
            "test_stable_diffusion_k_lms",
            "test_stable_diffusion_negative_prompt",
            "test_stable_diffusion_pndm",
        ],
        "asserts the pixels of StableDiffusionPipeline",
    ),
    **dict.fromkeys(
        ["test_pipeline_interrupt", "test_stable_diffusion_height_width_opt"],
        "calls the pipeline without a picture",
    ),
    **dict.fromkeys(
        ["test_stable_diffusion_lcm", "test_stable_diffusion_lcm_custom_timesteps", "test_stable_diffusion_ays"],
        "has a U-Net distilled to take its guidance as an input, which is refused",
    ),
    **dict.fromkeys(
        [
            "test_stable_diffusion_negative_prompt_embeds",
            "test_stable_diffusion_prompt_embeds",
        ],
        "gives embeddings without the prompt, whose words masks name and Eq. 3 compares",
    ),
    "test_encode_prompt_works_in_isolation": "looks the class up in diffusers (and would then edit without a prompt)",
    **dict.fromkeys(
        ["test_vae_tiling", "test_stable_diffusion_vae_tiling"],
        "takes a picture through a VAE of random weights, which reads and draws it otherwise in tiles (1.7 of 1)",
    ),
    **dict.fromkeys(
        ["test_pipeline_accept_tuple_type_unet_sample_size", "test_stable_diffusion_no_safety_checker"],
        "loads a StableDiffusionPipeline from the Hub, and does not touch this one",
    ),
}


def reason(nodeid: str) -> str | None:
    place, test = nodeid.split("::")
    return REASONS.get(place) or REASONS.get(test)


class Outcomes:
    """A pytest plugin that counts, and says which failures have a reason."""

    def __init__(self):
        self.passed, self.skipped, self.failed = [], [], []

    def pytest_runtest_logreport(self, report):
        if report.failed or report.skipped or report.when == "call":
            getattr(self, report.outcome).append(report.nodeid.split("::", 1)[1])

    def report(self) -> int:
        known = [name for name in self.failed if reason(name)]
        unknown = [name for name in self.failed if not reason(name)]
        surprises = [name for name in self.passed if reason(name)]
        lines = [f"fails, since it {reason(name)}: {name}" for name in known]
        lines += [f"fails: {name}" for name in unknown] + [f"passes, though: {name}" for name in surprises]
        counts = f"{len(self.passed)} passed, {len(self.skipped)} skipped"
        print(*lines, f"{counts}, {len(known)} fail for a known reason, {len(unknown)} without", sep="\n")
        return int(bool(unknown or surprises))


@cache
def encoder(tokens: int):
    """A tokenizer that reads so many tokens, and the folder of a text encoder for it."""
    folder = Path(tempfile.mkdtemp(dir=os.environ["SUITE_FOLDER"]))
    text = make_tokenizer(folder, ("a", "of", "photo", "painting", "very", "long", "longvery"), tokens)
    config = CLIPTextConfig(
        vocab_size=len(text),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=tokens,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
    )
    torch.manual_seed(0)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return text, folder / "text_encoder"


class Config:
    """What both generations ask of a test class, and tiny components."""

    pipeline_class = MDEEditPipeline
    tokens = 77
    params = required_input_params_in_call_signature = TEXT_TO_IMAGE_PARAMS | {"image", "source_prompt"}
    # an edit starts where the inversion ended, not from `latents`
    required_optional_params = optional_input_params = frozenset(
        ["num_inference_steps", "num_images_per_prompt", "generator", "output_type", "return_dict"]
    )
    batch_params = batch_input_params = frozenset(
        ["prompt", "negative_prompt", "image", "source_prompt", "object_masks"]
    )
    callback_cfg_params = TEXT_TO_IMAGE_CALLBACK_CFG_PARAMS
    image_params, image_latents_params = frozenset(["image"]), frozenset()
    test_layerwise_casting = test_group_offloading = True
    output_shape = (3, 64, 64)

    def get_dummy_components(self, time_cond_proj_dim=None):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            cross_attention_dim=32,
            norm_num_groups=2,
            time_cond_proj_dim=time_cond_proj_dim,
        )
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        scheduler = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False)
        vae = AutoencoderKL(
            block_out_channels=[4, 8],
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=4,
            norm_num_groups=2,
        )
        text, folder = encoder(self.tokens)
        parts = {"unet": unet, "scheduler": scheduler, "vae": vae}
        parts["text_encoder"] = CLIPTextModel.from_pretrained(folder)  # an adapter's file says where its model is
        return {**parts, "tokenizer": text, "safety_checker": None, "feature_extractor": None, "image_encoder": None}

    def inputs(self, output_type):
        y, x = np.mgrid[0:64, 0:64] / 64
        half = np.zeros((64, 64), np.uint8)
        half[:, :32] = 255
        return {
            "prompt": "A painting of a squirrel eating a burger",
            "image": torch.from_numpy(np.stack([x, y, x * y])).mul(255).round().float()[None] / 255,  # as a PIL's
            "source_prompt": "A photo of a squirrel eating a burger",
            "object_masks": {1: half},  # by position: the suite cuts prompts anywhere
            "inversion_method": "direct",
            "generator": torch.Generator("cpu").manual_seed(0),
            "eta": 0.5,  # without noise several pictures of a prompt are all the same, and refused
            "num_inference_steps": 2,
            "guidance_scale": 2.0,  # more makes much of what a VAE in tiles changes, with weights as random as these
            "optimization_iterations": 1,
            "output_type": output_type,
        }


class LongPrompts:
    """A prompt longer than what is read is refused here. The suite's has 201 tokens: an encoder that reads as many."""

    def test_inference_batch_consistent(self):
        self.tokens = 256
        super().test_inference_batch_consistent()

    def test_inference_batch_single_identical(self):
        self.tokens = 256
        super().test_inference_batch_single_identical()


class New(Config, new.BasePipelineTesterConfig):
    def get_dummy_inputs(self):
        return self.inputs("pt")


class TestNew(LongPrompts, New, stable_diffusion.TestStableDiffusionPipeline):
    """The mixin, and the tests that Stable Diffusion's own class adds."""


class TestNewMemory(New, new.MemoryTesterMixin):
    pass


class TestNewLora(New, new.LoraTesterMixin, new.UNetLoraTesterMixin):
    pass


class TestNewLoraMemory(New, new.LoraMemoryTesterMixin):
    pass


class TestNewIPAdapter(New, ip_adapter_tester.IPAdapterTesterMixin):
    pass


class Old(Config):
    def get_dummy_inputs(self, device, seed=0):
        return self.inputs("np")


class TestOld(
    LongPrompts,
    Old,
    old.PipelineLatentTesterMixin,
    old.PipelineKarrasSchedulerTesterMixin,
    old.PipelineFromPipeTesterMixin,
    old.SDFunctionTesterMixin,
    old.PipelineTesterMixin,
    unittest.TestCase,
):
    def test_encode_prompt_works_in_isolation(self):
        super().test_encode_prompt_works_in_isolation({"device": "cpu", "do_classifier_free_guidance": True})

    def test_from_pipe_consistent_config(self):
        # on a pipeline made here in place of the Hub's
        base = StableDiffusionPipeline(**self.get_dummy_components(), requires_safety_checker=False)
        with mock.patch.object(StableDiffusionPipeline, "from_pretrained", return_value=base):
            super().test_from_pipe_consistent_config()


class TestOldIPAdapter(Old, old.IPAdapterTesterMixin, unittest.TestCase):
    pass


class TestOldLora(Config, PeftLoraLoaderMixinTests, unittest.TestCase):
    unet_kwargs = {"block_out_channels": (8, 16), "layers_per_block": 1}
    output_shape = (1, 64, 64, 3)

    def get_dummy_components(self, scheduler_cls=None, use_dora=False, lora_alpha=None):
        lora = {"r": 4, "lora_alpha": lora_alpha or 4, "init_lora_weights": False, "use_dora": use_dora}
        configs = (
            LoraConfig(target_modules=names, **lora)
            for names in (self.text_encoder_target_modules, self.denoiser_target_modules)
        )
        return super().get_dummy_components(), *configs

    def get_dummy_inputs(self, with_generator=True):
        inputs = self.inputs("np")
        if not with_generator:
            del inputs["generator"]
        return None, None, inputs


if __name__ == "__main__":
    sys.exit(main())
