"""E3Net: counts of the specification, a forward pass by hand, causality, conditioning."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from speechdistill.models import parameters
from speechdistill.models.networks.e3net import VARIANTS, Block, E3Net, E3NetConfig, debug, e3net, num_frames


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (e3net(2, speaker=128), 4_507_911),
        (e3net(4, speaker=128), 6_614_795),
        (e3net(8, speaker=128), 10_828_563),
        (e3net(2), 4_540_679),
        (e3net(4), 6_647_563),
        (e3net(8), 10_861_331),
        *(
            (replace(e3net(4, speaker=128), filters=f), n)
            for f, n in ((256, 4_543_243), (512, 4_839_179), (1024, 5_431_051))
        ),
        (replace(e3net(4, speaker=0), features=768), 6_778_635),
        (debug(), 347_719),
    ],
)
def test_parameters_are_those_of_the_paper_to_the_last(config: E3NetConfig, count: int) -> None:
    with torch.device("meta"):
        assert parameters.count(E3Net(config)).trainable == count


def test_blocks_are_of_the_published_size() -> None:
    assert parameters.count(Block(256, 1024)).trainable == 1_053_442
    assert VARIANTS["e3net-n4"] == e3net(4)


def network(config: E3NetConfig, dtype: torch.dtype = torch.float64) -> E3Net:
    torch.manual_seed(0)
    return E3Net(config).to(dtype).eval()


def linear(layer: torch.nn.Linear, x: np.ndarray) -> np.ndarray:
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def prelu(layer: torch.nn.PReLU, x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, layer.weight.item() * x)


def norm(layer: torch.nn.LayerNorm, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + layer.eps)
    return unit * layer.weight.detach().numpy() + layer.bias.detach().numpy()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def lstm(layer: torch.nn.LSTM, x: np.ndarray) -> np.ndarray:
    (wi, wh, bi, bh), size = (p.detach().numpy() for p in layer.parameters()), layer.hidden_size
    h, c, out = np.zeros(size), np.zeros(size), []
    for frame in x:
        i, f, g, o = np.split(wi @ frame + bi + wh @ h + bh, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.array(out)


def by_hand(net: E3Net, wave: np.ndarray, speaker: np.ndarray) -> np.ndarray:
    frames = num_frames(len(wave))
    padded = np.concatenate([np.zeros(160), wave, np.zeros(frames * 160 - len(wave))])
    kernel = net.encoder.weight.detach().numpy()[:, 0]
    coded = (
        np.array([kernel @ padded[160 * t : 160 * t + 320] for t in range(frames)]) + net.encoder.bias.detach().numpy()
    )
    known = np.tile((speaker - net.speaker_mean.numpy()) * np.sqrt(len(speaker)), (frames, 1))
    fc, act, last = net.projection
    x = norm(last, prelu(act, linear(fc, np.hstack([norm(net.norm, prelu(net.activation, coded)), known]))))
    for block in net.blocks:
        one, first, two, second, layer = block.connected
        y = norm(layer, prelu(second, linear(two, prelu(first, linear(one, x)))))
        x = norm(block.norm, y + norm(block.lstm_norm, lstm(block.lstm, y)))
    masked = coded * sigmoid(linear(net.mask, x))
    out = np.zeros(320 + 160 * (frames - 1)) + net.decoder.bias.item()
    for t in range(frames):
        out[160 * t : 160 * t + 320] += masked[t] @ net.decoder.weight.detach().numpy()[:, 0]
    return out[160 : 160 + len(wave)]


@pytest.mark.parametrize("num_samples", [1, 160, 1_000])
def test_a_network_of_two_filters_gives_what_numpy_gives(num_samples: int) -> None:
    net = network(E3NetConfig(blocks=2, filters=2, dim=3, hidden=4, speaker=5))
    net.speaker_mean += torch.rand(5, dtype=torch.float64)
    rng = np.random.default_rng(1)
    wave, speaker = rng.standard_normal(num_samples), rng.random(5)
    with torch.inference_mode():
        enhanced = net(torch.from_numpy(wave)[None], torch.from_numpy(speaker)[None])[0].numpy()
    np.testing.assert_allclose(enhanced, by_hand(net, wave, speaker), atol=1e-12)


def test_nothing_before_the_window_of_a_change_changes() -> None:
    net = network(debug())
    wave, speaker = torch.randn(1, 4_800, dtype=torch.float64), torch.rand(1, 256, dtype=torch.float64)
    other = wave.clone()
    other[0, 2_401] += 1
    with torch.inference_mode():
        different = (net(wave, speaker) - net(other, speaker))[0].abs() > 1e-12
    first = int(different.nonzero()[0])
    assert 2_400 - 160 <= first <= 2_401, "the first window with the change begins one hop before that hop"


def test_the_speaker_and_the_features_of_frames_condition_the_output() -> None:
    net = network(replace(debug(), features=8))
    wave = torch.randn(2, 1_600, dtype=torch.float64)
    speakers, features = (
        torch.rand(2, 256, dtype=torch.float64),
        torch.rand(2, num_frames(1_600), 8, dtype=torch.float64),
    )
    with torch.inference_mode():
        one = net(wave, speakers, features)
        assert one.shape == wave.shape
        assert (net(wave, speakers.flip(0), features) - one).abs().max() > 1e-6
        assert (net(wave, speakers, features.flip(1)) - one).abs().max() > 1e-6
        torch.testing.assert_close(net(wave[:1], speakers[:1], features[:1]), one[:1])


def test_conditions_that_do_not_fit_are_refused_with_their_names() -> None:
    wave, speaker = torch.zeros(1, 320), torch.zeros(1, 256)
    with pytest.raises(ValueError, match="speaker of 0 values; the network takes 256"):
        network(debug(), torch.float32)(wave)
    with pytest.raises(ValueError, match="features of 8 values; the network takes 0"):
        network(debug(), torch.float32)(wave, speaker, torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match="every size must be at least 1"):
        E3NetConfig(blocks=0)


def test_digital_silence_has_finite_gradients() -> None:
    net = network(debug(), torch.float32)
    net(torch.zeros(1, 1_600), torch.zeros(1, 256)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
