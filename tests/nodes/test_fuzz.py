"""Anything may be connected: a valid result or an `EditError`, never another exception."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from editkit.pipelines.core.errors import EditError
from editkit.tests.nodes.graph import call
from editkit.tests.toy_codec import ToyCodec
from editkit.tests.toys import ToyDenoiser, pointwise

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SIZES = st.integers(1, 200)
BATCHES = st.integers(1, 4)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
FILLS = st.sampled_from(["random", "empty", "full", "nan", "beyond"])


def sockets():
    from editkit.hosts.host import HeadlessModel, HeadlessVae

    return HeadlessModel(ToyDenoiser(pointwise(), channels=3)), HeadlessVae(ToyCodec())


def filled(shape: tuple[int, ...], fill: str, dtype: torch.dtype) -> torch.Tensor:
    value = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    value = {"random": value, "empty": value * 0, "full": value * 0 + 1, "nan": value / 0 * 0, "beyond": value * 300}[
        fill
    ]
    return value.to(dtype)


def text(rows: int = 1):
    return [[torch.ones(rows, 4, 5), {}]]


@QUICK
@given(
    SIZES, SIZES, BATCHES, BATCHES, FILLS, DTYPES, st.booleans(), st.sampled_from(["equal steps", "equal log-sigma"])
)
def test_the_whole_chain(height, width, images, masks, fill, dtype, same, parts):
    """Encode, mask, schedule, noise, blend, decode, tune, composite: sizes, batches, dtypes and contents of all kinds."""
    model, vae = sockets()
    image = filled((images, height, width, 3), "random", dtype)
    mask = filled(
        (
            masks,
            height if same else width,
            width,
        ),
        fill,
        dtype,
    )
    try:
        latent = call("EncodeImage", image=image, vae=vae)[0]
        latent_pixels, kept = call("LatentMask", mask=mask, latent=latent)
        schedule = call("DilationSchedule", latent_mask=latent_pixels, parts=parts)[0]
        sigmas = call("EditSigmas", model=model, steps=2)[0]
        noised = call("NoiseLatent", model=model, latent=latent, sigmas=sigmas)[0]
        edited = call(
            "BlendedDenoise", model=model, positive=text(), negative=text(), sigmas=sigmas, latent=noised,
            source_latent=latent, schedule=schedule,
        )[0]  # fmt: skip
        decoded = call("DecodeLatent", latent=edited, vae=vae)[0]
        result, change = call("CompositeSource", edited=decoded, source=image, mask=mask)
    except EditError:
        return
    assert 0 <= kept <= 1 and change == 0
    assert result.shape == (max(images, masks), height, width, 3) and torch.isfinite(result).all()


@QUICK
@given(st.integers(1, 60), st.integers(1, 60), BATCHES, BATCHES, BATCHES, FILLS, DTYPES)
def test_background_nodes(height, width, images, sources, masks, fill, dtype):
    edited, source = (filled((n, height, width, 3), "random", dtype) for n in (images, sources))
    mask = filled((masks, height, width), fill, dtype)
    for name in ("BlendPixels", "BlendPoisson", "CompositeSource"):
        try:
            image = call(name, edited=edited, source=source, mask=mask)[0]
        except EditError:
            continue
        assert image.shape == (max(images, sources, masks), height, width, 3) and torch.isfinite(image).all()


@QUICK
@given(st.integers(1, 40), st.integers(1, 40), BATCHES, BATCHES, FILLS, st.sampled_from(["TuneDecoder", "TuneLatent"]))
def test_tuning_nodes(height, width, images, masks, fill, name):
    _, vae = sockets()
    image = filled((images, height, width, 3), "random", torch.float32)
    mask = filled((masks, height, width), fill, torch.float32)
    try:
        latent = call("EncodeImage", image=image, vae=vae)[0]
        tuned = call(name, vae=vae, latent=latent, source=image, mask=mask, steps=1)[1]
    except EditError:
        return
    assert tuned.shape == (max(images, masks), height, width, 3) and torch.isfinite(tuned).all()


@QUICK
@given(st.integers(-3, 60), st.floats(-1, 2), st.integers(-2, 60), st.integers(0, 60))
def test_sigmas_and_ranges(steps, strength, start, end):
    model, _ = sockets()
    try:
        sigmas = call("EditSigmas", model=model, steps=steps, strength=strength)[0]
        latent = {"samples": torch.zeros(1, 3, 4, 4)}
        edited = call(
            "BlendedDenoise", model=model, positive=text(), negative=text(), sigmas=sigmas, latent=latent,
            source_latent=latent, schedule=torch.ones(1, 4, 4), start_step=start, end_step=end,
        )[0]["samples"]  # fmt: skip
    except EditError:
        return
    assert 0 <= start < end and edited.shape == (1, 3, 4, 4) and torch.isfinite(edited).all()


@QUICK
@given(
    st.integers(1, 60), st.integers(1, 60), BATCHES, BATCHES, FILLS, DTYPES, st.floats(-0.1, 1.1), st.integers(0, 3),
    st.sampled_from(["next", "current", "implicit"]),
)  # fmt: skip
def test_the_diffedit_chain(height, width, images, masks, fill, dtype, ratio, maps, mode):
    """Encode, mask from prompts, invert, decode under that mask and under any other, change by degrees."""
    model, vae = sockets()
    image = filled((images, height, width, 3), "random", dtype)
    try:
        latent = call("EncodeImage", image=image, vae=vae)[0]
        mask, latent_pixels, heat, soft = call(
            "DiffEditMask", model=model, latent=latent, source=[[torch.zeros(1, 4, 5), {}]], target=text(), maps=maps, smooth=3,
            threshold=0.33,
        )  # fmt: skip
        sigmas = call("EditSigmas", model=model, steps=3, strength=1.0)[0]
        trajectory, noised, psnr, _, _ = call(
            "InvertDDIM", model=model, positive=text(), latent=latent, sigmas=sigmas, mode=mode, encoding_ratio=ratio, vae=vae,
            image=image,
        )  # fmt: skip
        assert mask.shape == (images, height, width) and heat.shape == (images, height, width, 3)
        assert noised["samples"].shape == latent["samples"].shape and psnr <= 100
        other = filled((masks, *latent_pixels.shape[1:]), fill, dtype)
        for under in (latent_pixels, other, call("ReleaseSchedule", latent_mask=soft)[0]):
            edited = call(
                "MaskedDecode", model=model, positive=text(), negative=text(), trajectory=trajectory, latent_mask=under,
                encoding_ratio=ratio,
            )[0]  # fmt: skip
            decoded = call("DecodeLatent", latent=edited, vae=vae)[0]
            assert decoded.shape[1:] == (height, width, 3) and torch.isfinite(decoded).all()
    except EditError:
        return
