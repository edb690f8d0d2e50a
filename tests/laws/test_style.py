"""StyleDiffusion's learning: networks, losses, warm start, who receives gradients, and what is left in every outcome."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from editkit.pipelines.attention.pair_batch import single_rows
from editkit.pipelines.attention.token_maps import MapGrid
from editkit.pipelines.core.attention_sites import Controlled, Passive
from editkit.pipelines.core.errors import ParameterError
from editkit.pipelines.core.sigmas import euler_step
from editkit.pipelines.inversion.ddim import reconstruct
from editkit.pipelines.stylediffusion.inversion import PRESETS, StyleOptions, image_features, style_invert
from editkit.pipelines.stylediffusion.learning_control import LEAST_SIDE
from editkit.pipelines.stylediffusion.networks import MappingNetworks, NetworkShape, made_networks, value_embedding
from editkit.tests.toy_attention import site
from editkit.tests.toy_values import FEATURES, NULL, SHORT, SOURCE, AttentionDenoiser, B, D, S, T, inverted, learned
from editkit.tests.toys import random_latent


# ---------------------------------------------------------------------------------------------------------- networks
def test_t15_published_sizes():
    assert NetworkShape(197, 77).count == 78_540
    assert NetworkShape(197, 77, "direct").count == 27_412
    assert (NetworkShape(50, 154).width, NetworkShape(50, 154, "direct").width) == (308, 154)


@pytest.mark.parametrize("form", ["affine", "direct"])
@pytest.mark.parametrize("init", ["published", "paper"])
def test_t15_each_network_is_the_published_one_on_a_batch_of_one(form, init):
    """Conv1d over tokens, and BatchNorm1d in training mode, whose statistics are then those of the features."""
    shape = NetworkShape(S, T, form)
    networks = made_networks(shape, [4, 9], init)
    found, w = networks(FEATURES), shape.width
    for image in range(B):
        published = nn.Sequential(
            nn.Conv1d(S, w, 1), nn.Conv1d(w, w, 1), nn.BatchNorm1d(w), nn.LeakyReLU(0.01), nn.Conv1d(w, w, 1)
        ).train()
        names = {"0": "first", "1": "middle", "2": "norm", "4": "last"}
        for name, parameter in published.named_parameters():
            layer, _, kind = name.partition(".")
            parameter.data = networks.parameters[f"{names[layer]}.{kind}"][image].reshape(parameter.shape)
        seen = []
        published[2].register_forward_hook(lambda module, inputs, output: seen.append(output[0]))  # noqa: B023
        assert torch.allclose(found[image], published(FEATURES[image : image + 1])[0], atol=1e-5)
        assert torch.allclose(seen[0].mean(1), torch.zeros(w), atol=1e-5)
        if init == "published":  # the paper's weights are so small that the published 1e-5 counts
            assert torch.allclose(seen[0].var(1, unbiased=False), torch.ones(w), atol=1e-2)


def test_first_weights_belong_to_the_seed_and_to_pytorchs_ranges():
    shape = NetworkShape(64, 40)
    both, one = made_networks(shape, [4, 9]), made_networks(shape, [9])
    for name, value in both.parameters.items():
        assert torch.equal(value[1:], one.parameters[name])
    for name, fan_in in (("first", 64), ("middle", 80), ("last", 80)):
        for part in ("weight", "bias"):
            value = one.parameters[f"{name}.{part}"]
            assert 0.9 * fan_in**-0.5 < value.abs().max() <= fan_in**-0.5
    paper = made_networks(shape, [9], "paper").parameters
    assert paper["middle.weight"].std().item() == pytest.approx(0.01, rel=0.05) and not paper["last.bias"].any()


def test_identity_passes_the_text_on_bit_for_bit():
    networks = made_networks(NetworkShape(S, T), [0, 1], "identity")
    scale, shift = networks.split(networks(FEATURES))
    own = random_latent(B, T, D, seed=5)
    assert torch.equal(value_embedding(scale, shift, own), own)
    with pytest.raises(ParameterError, match="affine"):
        made_networks(NetworkShape(S, T, "direct"), [0], "identity")


def test_affine_scales_and_shifts_each_text_and_direct_replaces_it():
    own, scale, shift = (random_latent(1, T, D, seed=seed) for seed in (1, 2, 3))
    assert torch.equal(value_embedding(scale, shift, own), own * scale + shift)
    assert torch.equal(value_embedding(None, shift, own), shift)


# ----------------------------------------------------------------------------------------------------------- presets
def test_t15_published_schedule():
    options = PRESETS["published"]
    counts = [options.updates(step) for step in range(30)]
    assert counts[:3] == [100, 91, 82] and counts[-1] == 6 and sum(counts) == 1015
    assert [options.rate(step) for step in (0, 29)] == pytest.approx([1e-2, 0.71e-2])
    assert [options.threshold(step) for step in (0, 29)] == pytest.approx([1e-5, 59e-5])
    assert options.betas == (0.9, 0.999) and options.rate(1000) > 0


def test_the_papers_own_settings():
    options = PRESETS["paper"]
    assert [options.updates(step) for step in range(30)] == [100, 37, 14, 5, 2] + [1] * 25
    assert (options.form, options.init, options.betas, options.rate(29)) == ("direct", "paper", (0.0, 0.999), 1e-4)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"form": "wide"}, "network form"), ({"init": "zero"}, "init"), ({"targets": "none"}, "targets"),
        ({"inner": -1}, "inner"), ({"lr": 0.0}, "lr"), ({"attention_weight": -1.0}, "attention_weight"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(wrong, named):
    with pytest.raises(ParameterError, match=named):
        StyleOptions(**wrong)


# ---------------------------------------------------------------------------------------------------------- learning
def test_no_updates_from_identity_is_plain_guidance():
    denoiser = AttentionDenoiser()
    path = inverted(denoiser)
    result = learned(denoiser, path, StyleOptions(inner=0, init="identity"))
    plain = reconstruct(denoiser, path, SOURCE, negative=NULL, guidance_scale=7.5)
    assert torch.allclose(result.rebuilt, plain, atol=1e-5)
    assert result.updates == [0] * 4 and torch.equal(result.embeddings.scale, torch.ones(4, B, T, D))


def test_the_maps_loss_vanishes_on_the_inversion_itself():
    """At guidance 1 with the text's own values, sampling retraces an exact inversion, and so do the maps."""
    denoiser = AttentionDenoiser()
    path = inverted(denoiser)
    result = learned(denoiser, path, StyleOptions(guidance_scale=1, inner=0, init="identity"))
    assert result.map_distance.max() < 1e-9 and torch.allclose(result.rebuilt, path.source, atol=1e-4)
    assert learned(denoiser, path, StyleOptions(inner=0, init="identity")).map_distance[1:].min() > 1e-7


def test_learning_retraces_the_trajectory():
    denoiser = AttentionDenoiser()
    path = inverted(denoiser)
    before = (reconstruct(denoiser, path, SOURCE, negative=NULL, guidance_scale=7.5) - path.source).norm()
    for init in ("published", "identity"):
        result = learned(denoiser, path, StyleOptions(inner=60, inner_decay=0.0, init=init))
        assert (result.rebuilt - path.source).norm() < 0.2 * before
    direct = learned(denoiser, path, StyleOptions(inner=60, inner_decay=0.0, form="direct"))
    assert direct.embeddings.scale is None and (direct.rebuilt - path.source).norm() < 0.2 * before


def test_one_update_lowers_the_loss():
    denoiser = AttentionDenoiser()
    path = inverted(denoiser)
    short = replace(path, sigmas=path.sigmas[:2], latents=path.latents[:2])
    seen = [learned(denoiser, short, replace(SHORT, inner=n, lr=1e-3)).losses[-1] for n in (1, 2, 3)]
    assert seen[0] > seen[1] > seen[2] > 0


class Maps(Passive):
    """Full maps of the layers on the way down and up, and what was asked for values."""

    def __init__(self):
        self.maps = []

    def wants(self, site):
        return site.cross and site.place != "mid"

    def attend(self, q, k, v, site):
        self.maps.append(torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1))


def maps_at(denoiser, z, sigma, value: Tensor | None = None):
    class Valued(Maps):
        def wants(self, site):
            return site.cross

        def inputs(self, key, own, site):
            return key, own if value is None else value

        def attend(self, q, k, v, site):
            return super().attend(q, k, v, site) if site.place != "mid" else None

    control = Valued()
    with torch.no_grad():
        clean = denoiser.denoise(z, sigma, [SOURCE], Controlled(control, single_rows(len(z), ("cond",))))[0]
    return clean, control.maps


@pytest.mark.parametrize("targets", ["aligned", "published"])
def test_the_loss_is_the_published_sum(targets):
    """Mean squared distance to the trajectory in the variance-preserving scale, plus the maps' per layer."""
    denoiser = AttentionDenoiser()
    path = inverted(denoiser)
    result = learned(denoiser, path, replace(SHORT, inner=1, targets=targets))
    networks = made_networks(NetworkShape(S, T), [0, 1])
    value = value_embedding(*networks.split(networks(FEATURES)), SOURCE.tokens.expand(B, -1, -1))
    levels = path.sigmas.tolist()
    clean, maps = maps_at(denoiser, path.latent(0), levels[0], value)
    with torch.no_grad():
        uncond = denoiser.denoise(path.latent(0), levels[0], [NULL])[0]
    reached = euler_step(path.latent(0), uncond + 7.5 * (clean - uncond), levels[0], levels[1])
    if targets == "aligned":
        _, goal = maps_at(denoiser, path.latent(0), levels[0])
    else:  # the last set of the official list, appended twice: the next latent at this noise level
        shown = path.latent(1) * ((1 + levels[0] ** 2) / (1 + levels[1] ** 2)) ** 0.5
        _, goal = maps_at(denoiser, shown, levels[0])
    expected = (reached - path.latent(1)).square().mean() / (1 + levels[1] ** 2)
    expected = expected + sum((a - b).square().mean() for a, b in zip(maps, goal, strict=True))
    assert result.losses[0] == pytest.approx(float(expected), rel=1e-4)


def test_published_targets_show_the_latent_one_step_noisier():
    denoiser = AttentionDenoiser()
    path = inverted(denoiser)
    learned(denoiser, path, replace(SHORT, inner=0, targets="published"))
    del denoiser.log[2]  # the row that tells how much memory an update takes
    goals = denoiser.log[::3]  # the goal comes first, then the unconditional row, then the one to advance
    levels = path.sigmas.tolist()
    assert [sigma for sigma, _, _ in goals] == pytest.approx([levels[0], *levels[:3]])
    shown = path.latent(2) * ((1 + levels[1] ** 2) / (1 + levels[2] ** 2)) ** 0.5
    assert torch.allclose(goals[2][2], shown)


def test_without_the_maps_loss_they_are_only_measured():
    denoiser = AttentionDenoiser()
    path = inverted(denoiser)
    options = StyleOptions(inner=40, inner_decay=0.0, attention_weight=0.0)
    bare, held = learned(denoiser, path, options), learned(denoiser, path, replace(options, attention_weight=100.0))
    assert held.map_distance.mean() < 0.7 * bare.map_distance.mean()
    assert bare.map_distance.shape == (4, B)


def test_every_row_is_evaluated_once():
    denoiser = AttentionDenoiser()
    path = inverted(denoiser)
    learned(denoiser, path, replace(SHORT, tolerance=0.0, tolerance_growth=0.0))
    assert denoiser.forward_passes == B * (1 + 4 * (1 + 1 + 3 + 1)) and max(count for _, count, _ in denoiser.log) == 1
    denoiser.forward_passes = 0
    learned(denoiser, path, replace(SHORT, guidance_scale=1, tolerance=0.0, tolerance_growth=0.0))
    assert denoiser.forward_passes == B * (1 + 4 * (1 + 3 + 1))


def test_images_and_call_sizes_do_not_matter():
    path, options = inverted(AttentionDenoiser()), StyleOptions(inner=8, inner_decay=0.1, tolerance=0.02)
    both = learned(AttentionDenoiser(), path, options, seeds=[7, 8])
    cut = learned(AttentionDenoiser(max_rows=1), path, options, seeds=[7, 8])
    assert torch.allclose(both.rebuilt, cut.rebuilt, atol=1e-5)
    for image in range(B):
        one = slice(image, image + 1)
        alone = replace(path, latents=path.latents[:, one], source_latent=path.source_latent[one])
        single = style_invert(
            AttentionDenoiser(), alone, SOURCE, NULL, FEATURES[one], seeds=[7 + image], options=options
        )
        assert torch.allclose(both.embeddings.scale[:, one], single.embeddings.scale, atol=1e-4)
        assert torch.allclose(both.rebuilt[one], single.rebuilt, atol=1e-4)


def test_a_step_starts_from_the_weights_of_the_one_before(monkeypatch):
    denoiser, starts, ends = AttentionDenoiser(), [], []
    path = inverted(denoiser)
    call = MappingNetworks.__call__

    def spy(self, features):
        state = {name: value.detach().clone() for name, value in self.parameters.items()}
        (starts if torch.is_grad_enabled() else ends).append(state)
        return call(self, features)

    monkeypatch.setattr(MappingNetworks, "__call__", spy)
    learned(denoiser, path, replace(SHORT, inner=1))
    del starts[0]  # the memory estimate's
    assert len(starts) == len(ends) == 4
    for end, start in zip(ends, starts[1:], strict=False):
        assert all(torch.equal(end[name], start[name]) for name in end)
    assert not torch.equal(starts[0]["last.bias"], ends[0]["last.bias"])


# ------------------------------------------------------------------------------------------------------------ images
class Tokens:
    def __init__(self, width: int):
        self.width = width

    def image_tokens(self, images):
        return images.mean((1, 2, 3)).view(-1, 1, 1) * random_latent(1, 40, self.width, seed=8)


def test_features_of_the_texts_width_are_the_tokens_themselves():
    image = torch.rand(2, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(image_features(Tokens(D), image, D), Tokens(D).image_tokens(image))


@pytest.mark.parametrize("width", [5, 30])
def test_features_of_another_width_keep_their_geometry(width):
    image = torch.full((1, 8, 8, 3), 0.5)
    own, found = Tokens(width).image_tokens(image)[0], image_features(Tokens(width), image, D)[0]
    assert found.shape == (40, D) and found.std().item() == pytest.approx(own.std().item(), rel=0.25)
    if width < D:  # nothing is lost: the products of all pairs of tokens are the same but for a factor
        assert torch.allclose(found @ found.mT, own @ own.mT * (D / width), atol=1e-4)


@pytest.mark.parametrize(
    "latent_pixels, grid",
    [
        ((64, 64), (16, 16)),
        ((96, 64), (24, 16)),
        ((32, 32), (8, 8)),
        ((12, 12), (6, 6)),
        ((20, 12), (10, 6)),
        ((9, 9), (9, 9)),
    ],
)
def test_maps_are_compared_at_a_quarter_of_the_latent_while_it_has_six_latent_pixels(latent_pixels, grid):
    for place, cross in (("down", True), ("up", True), ("mid", True), ("up", False)):
        chosen = [
            divisor
            for divisor in (1, 2, 4, 8)
            if MapGrid(places=("down", "up"), smallest=LEAST_SIDE).has(
                site(
                    (),
                    place=place,
                    cross=cross,
                    latent_pixels=latent_pixels,
                    grid=tuple(-(-side // divisor) for side in latent_pixels),
                )
            )
        ]
        wanted = [-(-latent_pixels[0] // grid[0])] if cross and place != "mid" else []
        assert chosen == wanted
