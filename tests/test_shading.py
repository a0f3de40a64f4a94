"""Materials and backgrounds: when there is light, Lambert's law, where a texel stands."""

import math
import random
from collections import Counter

import pytest
import torch

from gps_guidance.lift.networks import MLP
from gps_guidance.lift.shading import (
    BACKGROUNDS,
    DiffuseWithPointLight,
    NeuralEnvironmentMap,
    NoMaterial,
    SolidColor,
    Textured,
)

GRAY = torch.zeros(1, 3)  # features whose sigmoid is 1/2
MLP_CONFIG = {"otype": "VanillaMLP", "n_neurons": 8, "n_hidden_layers": 1}


def lit(material, degrees=60.0, features=GRAY, distance=2.0, **given):
    """Colour at the origin, facing up, with a light ``degrees`` off the vertical."""
    turn = math.radians(degrees)
    light = distance * torch.tensor([[math.sin(turn), 0.0, math.cos(turn)]])
    return material(features, positions=torch.zeros(1, 3), light_positions=light,
                    shading_normal=torch.tensor([[0.0, 0.0, 1.0]]), **given)[0].tolist()


def diffuse_material(train=False, **settings):
    return DiffuseWithPointLight(DiffuseWithPointLight.Config(**settings)).train(train)


# --- materials -------------------------------------------------------------------------------


@pytest.mark.parametrize(("degrees", "light"), [
    (0.0, 1.0), (60.0, 0.1 + 0.9 * 0.5), (90.0, 0.1), (150.0, 0.1)])
def test_lambert(degrees, light):
    """Ambient 0.1 plus 0.9 cos: a light behind the surface gives none; its distance is nothing."""
    material = diffuse_material()
    assert lit(material, degrees) == pytest.approx([0.5 * light] * 3, abs=1e-6)
    assert lit(material, degrees, distance=50.0) == pytest.approx([0.5 * light] * 3, abs=1e-6)
    textureless = lit(material, degrees, shading="textureless")
    assert textureless == pytest.approx([light] * 3, abs=1e-6)
    assert lit(material, degrees, shading="albedo") == [0.5] * 3


def test_light_colours_and_ambient_ratio():
    material = diffuse_material(ambient_light_color=(0.2, 0.0, 0.1),
                                diffuse_light_color=(0.4, 1.0, 0.0))
    assert lit(material) == pytest.approx([0.2, 0.25, 0.05])
    ratio = lit(material, ambient_ratio=0.3)  # 0.3 + 0.7 cos 60
    assert ratio == pytest.approx([0.5 * 0.65] * 3)


def test_ambient_only_steps():
    material = diffuse_material(ambient_only_steps=10)
    for step, flat in ((0, True), (9, True), (10, False), (11, False)):
        material.update_step(0, step)
        assert (lit(material) == [0.5] * 3) is flat, step
        material.train()
        seen = {tuple(lit(material)) for _ in range(40)}
        assert (len(seen) == 1) is flat, step
        material.eval()


def test_evaluation_is_diffuse_unless_it_is_ambient_only():
    assert lit(diffuse_material()) == pytest.approx([0.275] * 3)
    assert lit(diffuse_material(ambient_only_on_test=True)) == [0.5] * 3


def test_training_shades_as_often_as_configured():
    """Albedo 1/4, textureless 3/8, diffuse 3/8 with the default probabilities."""
    random.seed(0)
    material = diffuse_material(train=True, ambient_only_steps=0)
    material.update_step(0, 0)
    names = {0.5: "albedo", 0.55: "textureless", 0.275: "diffuse"}
    count = Counter(names[round(lit(material)[0], 4)] for _ in range(4000))
    expected = {"albedo": 1000, "textureless": 1500, "diffuse": 1500}
    assert count == pytest.approx(expected, abs=120)  # four standard deviations


def test_soft_shading_draws_a_ratio_in_training_alone():
    random.seed(0)
    material = diffuse_material(train=True, soft_shading=True)
    found = {round(lit(material, shading="textureless")[0], 6) for _ in range(20)}
    assert len(found) == 20 and 0.5 <= min(found) and max(found) <= 1.0
    assert lit(material.eval()) == pytest.approx([0.275] * 3)


def test_lights_send_gradients_to_normals_and_colours():
    features = GRAY.clone().requires_grad_()
    normal = torch.tensor([[0.0, 0.0, 1.0]], requires_grad=True)
    out = diffuse_material()(features, positions=torch.zeros(1, 3), shading_normal=normal,
                             light_positions=torch.ones(1, 3))
    out.sum().backward()
    assert features.grad.abs().min() > 0 and normal.grad.abs().min() > 0


def test_unknown_shading_is_refused():
    with pytest.raises(ValueError, match="shading is 'phong'"):
        lit(diffuse_material(), shading="phong")


def test_no_material_is_the_activated_feature():
    material = NoMaterial(NoMaterial.Config())
    assert material(torch.tensor([[0.0, math.log(3), -99.0]]))[0].tolist() == pytest.approx(
        [0.5, 0.75, 0.0])
    with pytest.raises(ValueError, match="n_output_dims is 3.*gives 4 features"):
        material(torch.zeros(1, 4))
    decoded = NoMaterial(NoMaterial.Config(input_feature_dims=5, mlp_network_config=MLP_CONFIG))
    assert isinstance(decoded.network, MLP) and decoded(torch.rand(2, 5)).shape == (2, 3)


def test_exported_albedo_has_no_light_in_it():
    features = torch.tensor([[0.0, math.log(3), 0.0]])
    for material in (diffuse_material(), NoMaterial(NoMaterial.Config())):
        albedo = material.export(features=features)["albedo"]
        assert albedo[0].tolist() == pytest.approx([0.5, 0.75, 0.5])


# --- backgrounds -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BACKGROUNDS))
def test_backgrounds_have_an_image_shape_and_a_gradient(name):
    cls = BACKGROUNDS[name]
    settings = {"learned": True} if cls is SolidColor else {}
    background = cls(cls.Config(**settings))
    dirs = torch.nn.functional.normalize(torch.randn(2, 3, 4, 3), dim=-1)
    colours = background(dirs)
    assert colours.shape == (2, 3, 4, 3)
    assert colours.min() >= 0 and colours.max() <= 1
    colours.sum().backward()
    for key, weights in background.named_parameters():
        assert weights.grad is not None and weights.grad.abs().sum() > 0, key


def test_a_solid_background_has_no_gradient_unless_learned():
    background = SolidColor(SolidColor.Config(color=(0.25, 0.5, 1)))
    assert not background.env_color.requires_grad
    assert background(torch.rand(1, 2, 2, 3))[0, 1, 1].tolist() == [0.25, 0.5, 1.0]


@pytest.mark.parametrize("cls", [SolidColor, NeuralEnvironmentMap])
def test_random_backgrounds_are_one_colour_an_image_in_training_alone(cls):
    torch.manual_seed(0)
    background = cls(cls.Config(random_aug=True, random_aug_prob=1.0))
    dirs = torch.nn.functional.normalize(torch.randn(2, 3, 4, 3), dim=-1)
    first, second = background(dirs)
    assert len(first.reshape(-1, 3).unique(dim=0)) == 1 and not torch.equal(first, second)
    assert not torch.equal(background(dirs)[0], first)
    background.eval()
    assert torch.equal(background(dirs), background(dirs))


def texture_of(height, width, values):
    background = Textured(Textured.Config(height=height, width=width, color_activation="none",
                                          n_output_dims=1))
    with torch.no_grad():
        background.texture.copy_(values.expand(1, 1, height, width))
    return lambda *direction: background(torch.tensor([[direction]])).item()


def test_the_textures_width_runs_from_the_zenith_down():
    colour = texture_of(2, 4, torch.arange(4.0))
    s = 0.5**0.5
    assert colour(0.0, 0.0, 1.0) == 0.0 and colour(0.0, 0.0, -1.0) == 3.0
    assert colour(1.0, 0.0, 0.0) == pytest.approx(1.5)  # the horizon: between the middle columns
    assert colour(s, 0.0, s) == pytest.approx(0.5)  # 45 degrees above it: a quarter of the width
    assert colour(0.0, -s, s) == pytest.approx(0.5)  # at any azimuth


def test_the_textures_height_runs_around_from_minus_180_degrees():
    colour = texture_of(8, 2, torch.arange(8.0)[:, None])
    assert colour(1.0, 0.0, 0.0) == pytest.approx(3.5)  # east: the middle
    assert colour(0.0, 1.0, 0.0) == pytest.approx(5.5)  # north: a quarter of a turn on
    assert colour(0.0, -1.0, 0.0) == pytest.approx(1.5)
    assert colour(-1.0, 1e-6, 0.0) == 7.0 and colour(-1.0, -1e-6, 0.0) == 0.0


def test_the_neural_backgrounds_evaluation_colour():
    background = NeuralEnvironmentMap(NeuralEnvironmentMap.Config(eval_color=(1.0, 0.5, 0.0)))
    dirs = torch.rand(1, 2, 2, 3)
    assert background(dirs).requires_grad
    assert background.eval()(dirs)[0, 1, 0].tolist() == [1.0, 0.5, 0.0]
