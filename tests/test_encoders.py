"""The tokens of positions and bearings."""

import math

import numpy as np
import pytest
import torch

from gps_guidance.encoders import AngleEncoder, GPSEncoder, positional_encoding

PISA = (43.70, 10.38, 43.74, 10.42)


def test_positional_encoding_by_hand():
    code = positional_encoding(torch.tensor([[0.25, -0.5]], dtype=torch.float64), 2, True)
    expected = []
    for x in (0.25, -0.5):
        expected += [math.sin(math.pi * x), math.sin(2 * math.pi * x)]
        expected += [math.cos(math.pi * x), math.cos(2 * math.pi * x), x]
    torch.testing.assert_close(code, torch.tensor([expected], dtype=torch.float64))
    assert positional_encoding(torch.zeros(5, 3), 10, False).shape == (5, 60)


def test_raw_input_tells_the_edges_of_a_city_apart():
    edges = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    without, within = (positional_encoding(edges, 10, raw) for raw in (False, True))
    torch.testing.assert_close(without[0], without[1], atol=1e-9, rtol=0)
    assert (within[0] - within[1]).abs().max() == 2


def test_one_turn_is_one_token():
    encoder = AngleEncoder(cross_attention_dim=16)
    tokens = encoder(torch.tensor([-180.0, 180.0, 540.0, -90.0, 270.0], dtype=torch.float64))
    assert tokens.shape == (5, 1, 16)
    for one, other in ((0, 1), (0, 2), (3, 4)):  # rows of one product may round differently
        torch.testing.assert_close(tokens[one], tokens[other], rtol=0, atol=1e-6)
    assert (tokens[0] - tokens[3]).abs().max() > 0.1


def test_all_bins_have_different_tokens():
    with torch.no_grad():
        tokens = AngleEncoder(cross_attention_dim=16)(torch.arange(0, 360, 10.0))[:, 0]
    distances = torch.cdist(tokens, tokens) + 1e3 * torch.eye(36)
    assert distances.min() > 0.1


def test_gps_tokens_have_an_axis():
    """Cross-attention ignores order: without the axis embedding (x, y) and (y, x) are one set."""
    points = np.array([[43.71, 10.41], [43.73, 10.39]])  # (x, y) = (.5, -.5) and (-.5, .5)
    with torch.no_grad():
        plain = GPSEncoder(16, PISA, axis_embedding=False)(points)
        tagged = GPSEncoder(16, PISA)(points)
    assert tagged.shape == (2, 2, 16)
    torch.testing.assert_close(plain[0], plain[1].flip(0), atol=1e-3, rtol=1e-3)
    assert (tagged[0] - tagged[1].flip(0)).abs().max() > 0.1


@pytest.mark.parametrize("match", [True, False])
def test_scale_of_the_tokens_at_initialisation(match):
    torch.manual_seed(0)
    lats = np.stack([np.linspace(43.70, 43.74, 99), np.full(99, 10.4)], -1)
    with torch.no_grad():
        gps = GPSEncoder(64, PISA, match_text_scale=match)(lats)[:, 1].std(0).mean()
        angle = AngleEncoder(64, match_text_scale=match)(torch.arange(-180, 180, 1.0)).std(0).mean()
    for spread in (gps, angle):
        assert (0.7 < spread < 1.3) if match else (spread < 0.4)


def test_nothing_is_zero_tokens():
    for encoder, count in [(GPSEncoder(16, PISA), 2), (AngleEncoder(16), 1)]:
        null = encoder.null(3)
        assert null.shape == (3, count, 16) and not null.any()


def test_save_and_load_give_the_same_tokens(tmp_path):
    angle = AngleEncoder(16, resolution=(48, 64), landmark="Stonehenge", null_text="empty")
    gps = GPSEncoder(16, PISA)
    angle.save_pretrained(tmp_path / "angle")
    gps.save_pretrained(tmp_path / "gps")
    angle_again = AngleEncoder.from_pretrained(tmp_path / "angle")
    gps_again = GPSEncoder.from_pretrained(tmp_path / "gps")
    bearing = torch.tensor([12.0, 340.0])
    assert torch.equal(angle_again(bearing), angle(bearing))
    assert angle_again.size == (48, 64) and angle_again.prompt == "A photo of Stonehenge"
    assert angle_again.config.null_text == "empty" and AngleEncoder(16).size == (256, 256)
    assert torch.equal(gps_again([[43.72, 10.4]]), gps([[43.72, 10.4]]))
    assert gps_again.bounds.as_tuple() == PISA


def test_gradients_reach_every_parameter():
    for encoder, value in [(GPSEncoder(16, PISA), [[43.72, 10.4]]),
                           (AngleEncoder(16), torch.tensor([30.0]))]:
        encoder(value).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match="null_text is 'none'"):
        AngleEncoder(16, null_text="none")
    with pytest.raises(ValueError, match="outside the bounds .* Did you swap"):
        GPSEncoder(16, PISA)([[10.4, 43.72]])
