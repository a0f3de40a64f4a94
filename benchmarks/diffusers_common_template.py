"""diffusers' common pipeline tests for ``StableDiffusionGPSPipeline``.

``diffusers_common_tests.py`` puts this file among diffusers' own. The tests, networks and inputs
are those of ``StableDiffusionPipeline``; added are an encoder and a place. ``Theirs`` runs them for
``StableDiffusionPipeline`` itself, so that our failures can be told from the environment's.
"""

import unittest

import pytest
import torch
from diffusers import StableDiffusionPipeline, pipelines
from transformers import CLIPTokenizer

from gps_guidance.encoders import AngleEncoder, GPSEncoder
from gps_guidance.miniature.nets import tiny_tokenizer
from gps_guidance.pipeline import StableDiffusionGPSPipeline

from .. import test_pipelines_common as common
from ..pipeline_params import TEXT_TO_IMAGE_CALLBACK_CFG_PARAMS, TEXT_TO_IMAGE_IMAGE_PARAMS
from ..stable_diffusion import test_stable_diffusion as sd
from ..testing_utils import LayerwiseCastingTesterMixin, PipelineOffloadTesterMixin

DIM = 8  # cross_attention_dim of diffusers' dummy UNet


def load_tokenizer(*args, **kwargs):
    """Instead of hf-internal-testing/tiny-random-clip: no download, and 77 tokens as well."""
    tokenizer = tiny_tokenizer([])
    tokenizer.model_max_length = 77
    return tokenizer


class Theirs(sd.StableDiffusionPipelineTesterConfig):
    place = {}
    params = sd.StableDiffusionPipelineTesterConfig.required_input_params_in_call_signature
    batch_params = sd.StableDiffusionPipelineTesterConfig.batch_input_params
    image_params = image_latents_params = TEXT_TO_IMAGE_IMAGE_PARAMS
    callback_cfg_params = TEXT_TO_IMAGE_CALLBACK_CFG_PARAMS
    test_layerwise_casting = test_group_offloading = True

    def get_dummy_components(self, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CLIPTokenizer, "from_pretrained", load_tokenizer)
            return super().get_dummy_components(**kwargs)

    def get_dummy_inputs(self, device=None, seed=0):
        inputs = super().get_dummy_inputs() | {"generator": self.get_generator(seed)} | self.place
        return inputs if device is None else inputs | {"output_type": "np"}


class Place(Theirs):
    pipeline_class = StableDiffusionGPSPipeline
    place = {"gps": (43.0, 47.0)}

    @pytest.fixture(autouse=True)
    def ours(self, monkeypatch):
        """What they assume: that our class is diffusers' own, and that it reads pickles."""
        monkeypatch.setattr(pipelines, "StableDiffusionGPSPipeline", self.pipeline_class,
                            raising=False)
        save = self.pipeline_class.save_pretrained
        monkeypatch.setattr(self.pipeline_class, "save_pretrained",
                            lambda *args, safe_serialization=True, **kwargs: save(*args, **kwargs))

    def encoder(self):
        return GPSEncoder(DIM, bounds=(40.0, 40.0, 50.0, 50.0))

    def get_dummy_components(self, **kwargs):
        components = super().get_dummy_components(**kwargs)
        torch.manual_seed(0)
        return components | {"gps_encoder": self.encoder()}


class Text(Place):
    place = {}


class Bearing(Place):
    place = {"bearing_deg": 90.0}
    test_stable_diffusion_height_width_opt = None  # the size is the encoder's, not the UNet's

    def encoder(self):
        return AngleEncoder(DIM, resolution=64, landmark="tower")


class StableDiffusionTests(sd.TestStableDiffusionPipeline):
    # these load StableDiffusionPipeline from the Hub, whatever the class under test
    test_stable_diffusion_no_safety_checker = None
    test_pipeline_accept_tuple_type_unet_sample_size = None


class OnTheCPU(LayerwiseCastingTesterMixin):
    """What ``MemoryTesterMixin`` skips without a GPU, although it needs none."""

    test_pipeline_with_accelerator_device_map = (
        PipelineOffloadTesterMixin.test_pipeline_with_accelerator_device_map)


class UnittestStyle(
    common.PipelineLatentTesterMixin, common.PipelineKarrasSchedulerTesterMixin,
    common.PipelineFromPipeTesterMixin, common.SDFunctionTesterMixin,
    common.IPAdapterTesterMixin, common.PipelineTesterMixin, unittest.TestCase,
):
    """The mixins before diffusers moved to pytest's style: some ask for more."""

    test_encode_prompt_works_in_isolation = None  # StableDiffusionTests runs it

    def test_from_pipe_consistent_config(self):
        """A local pipeline instead of hf-internal-testing/tiny-stable-diffusion-torch."""
        def load(repo, **kwargs):
            return StableDiffusionPipeline(**Theirs.get_dummy_components(self), **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StableDiffusionPipeline, "from_pretrained", load)
            super().test_from_pipe_consistent_config()


for config in (Theirs, Text, Place, Bearing):
    for mixin in (StableDiffusionTests, sd.MemoryTesterMixin, OnTheCPU, sd.IPAdapterTesterMixin,
                  UnittestStyle):
        name = f"Test{config.__name__}{mixin.__name__}"
        globals()[name] = type(name, (config, mixin), {})
del UnittestStyle, config, mixin, name  # pytest collects a TestCase by any name
