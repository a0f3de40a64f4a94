"""What diffusers loads by path: ``custom_pipeline="pipelines/stable_diffusion_gps.py"``."""

from gps_guidance.pipeline import StableDiffusionGPSPipeline

__all__ = ["StableDiffusionGPSPipeline"]
