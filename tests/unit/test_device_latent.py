"""A LATENT on the compute device: native code reads an ordinary tensor, our nodes get theirs back bit for bit."""

from __future__ import annotations

import copy
import json
import pickle
from collections import ChainMap, OrderedDict
from collections.abc import Callable
from operator import itemgetter

import pytest
import torch
from torch import Tensor

from editkit.hosts import latent as _latent
from editkit.hosts.latent import DeviceLatent, finished_out, latent_grid, latent_in, latent_out, samples_of
from editkit.pipelines.core.errors import MismatchError, ParameterError, ShapeError
from editkit.tests.toys import ToyDenoiser, linear

SIGMA = 0.6


def toy(flow: bool = False, fingerprint: str = "toy") -> ToyDenoiser:
    denoiser = ToyDenoiser(linear(0.5), flow=flow, scale=0.3)
    denoiser.fingerprint = fingerprint
    return denoiser


def random_z(batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, 6, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A host whose tensors live elsewhere: each native reading is one entry, and gives a tensor of that device."""
    log: list[str] = []

    def elsewhere() -> torch.device:
        log.append("read")
        return torch.device("meta")

    monkeypatch.setattr(_latent, "intermediate_device", elsewhere)
    return log


def keyword(**latent: object) -> object:
    return latent["samples"]


def matched(latent: DeviceLatent) -> object:
    match latent:
        case {"samples": samples, **rest} if rest:
            return samples
    return None


READERS: dict[str, Callable[[DeviceLatent], object]] = {
    "index": lambda d: d["samples"],
    "get": lambda d: d.get("samples"),
    "items": lambda d: dict(d.items())["samples"],
    "values": lambda d: next(iter(list(d.values()))) if next(iter(d)) == "samples" else list(d.values())[-1],
    "pop": lambda d: d.pop("samples"),
    "popitem": lambda d: [d.pop("noise_mask"), d.popitem()[1]][1],
    "setdefault": lambda d: d.setdefault("samples", 0),
    "copy": lambda d: d.copy()["samples"],
    "copy.copy": lambda d: copy.copy(d)["samples"],
    "deepcopy": lambda d: copy.deepcopy(d)["samples"],
    "unpack": lambda d: {**d}["samples"],
    "dict": lambda d: dict(d)["samples"],
    "update": lambda d: [e := {}, e.update(d)][0]["samples"],
    "or": lambda d: (d | {"x": 1})["samples"],
    "ror": lambda d: ({"x": 1} | d)["samples"],
    "keywords": lambda d: keyword(**d),
    "dict with keywords": lambda d: dict(d, x=1)["samples"],
    "dict.update": lambda d: [e := {}, dict.update(e, d)][0]["samples"],
    "dict.copy": lambda d: dict.copy(d)["samples"],
    "in-place or": lambda d: {}.__ior__(d)["samples"],
    "chain": lambda d: ChainMap(d)["samples"],
    "ordered": lambda d: OrderedDict(d)["samples"],
    "itemgetter": lambda d: itemgetter("samples")(d),
    "pattern": matched,
}


@pytest.mark.parametrize("reader", READERS)
def test_every_way_to_read_gives_the_hosts_tensor(reads: list[str], reader: str) -> None:
    latent = latent_out(random_z(), toy(), SIGMA, {"noise_mask": torch.ones(1)})
    value = READERS[reader](latent)
    assert isinstance(value, Tensor)
    assert value.device.type == "meta"
    assert value.shape == (2, 4, 6, 5)
    assert len(reads) == 1


def test_it_is_a_dict_like_any_other() -> None:
    latent = latent_out(random_z(), toy(), SIGMA, {"a": 1})
    samples = latent["samples"]
    plain = {"samples": samples, "a": 1}
    assert isinstance(latent, dict)
    assert latent == plain
    assert plain == latent
    assert (latent != plain) is False
    assert (plain != latent) is False
    assert latent != {}
    assert {} != latent  # noqa: SIM300  # the other way round is another method
    assert (list(latent), list(reversed(latent)), len(latent), bool(latent)) == (list(plain), ["a", "samples"], 2, True)
    assert latent.popitem() == ("a", 1)
    assert latent.popitem()[1] is samples
    with pytest.raises(KeyError):
        latent.popitem()


def test_json_reads_what_is_there() -> None:
    latent = latent_out(random_z(), toy(), SIGMA, {"a": 1})
    assert json.loads(json.dumps(latent, default=lambda value: list(value.shape))) == {"samples": [2, 4, 6, 5], "a": 1}
    with pytest.raises(TypeError, match="Tensor is not JSON serializable"):
        json.dumps(latent)


def test_what_asks_no_value_reads_nothing(reads: list[str]) -> None:
    latent = latent_out(random_z(), toy(), SIGMA, {"a": 1})
    assert "samples" in latent
    assert [*latent, *latent.keys()] == ["samples", "a"] * 2
    assert "DeviceTensor" in f"{latent}"
    latent.copy().clear()
    del copy.copy(latent)["samples"]
    assert (latent | {"samples": 0})["samples"] == 0
    assert latent.z is not None
    assert reads == []


@pytest.mark.parametrize("flow", [False, True])
def test_values_follow_the_hosts_convention(flow: bool) -> None:
    z, denoiser = random_z(), toy(flow)
    latent = latent_out(z, denoiser, SIGMA, {})
    expected = denoiser.scale_out(z / (1 - SIGMA) if flow else z)
    torch.testing.assert_close(latent["samples"], expected)
    assert latent["samples"] is latent["samples"]
    torch.testing.assert_close(latent_in({"samples": latent["samples"]}, denoiser, SIGMA), z)


@pytest.mark.parametrize("flow", [False, True])
def test_our_nodes_pass_it_on_untouched(reads: list[str], flow: bool) -> None:
    z, denoiser = random_z(), toy(flow)
    latent = latent_out(z, denoiser, SIGMA, {"editkit_size": (48, 40)})
    assert latent_in(latent, denoiser, SIGMA) is z
    masked = latent.copy()
    masked["noise_mask"] = torch.ones(1, 1, 6, 5)
    assert latent_in(masked, denoiser, SIGMA) is z
    assert latent_out(z, denoiser, SIGMA, masked).keys() >= {"noise_mask", "editkit_size", "samples"}
    assert samples_of(latent).shape == z.shape
    assert latent.z is z
    tensor = latent.device_tensor
    assert (tensor.sigma, tensor.denoiser_fingerprint) == (SIGMA, "toy")
    assert "samples" in latent
    assert len(latent) == 2
    assert "shape" in repr(latent)
    assert latent_grid(torch.zeros(1, 48, 40), latent, None)[:2] == (6, 5)
    assert reads == []


def test_another_model_gets_it_scaled_anew(reads: list[str]) -> None:
    z, other = random_z(), toy(fingerprint="other")
    other.scale = 0.6
    latent = latent_out(z, toy(), SIGMA, {})
    torch.testing.assert_close(latent_in(latent, other, SIGMA), z * 2)
    assert reads == []


def test_a_clean_latent_needs_no_model(reads: list[str]) -> None:
    clean = random_z()
    latent = finished_out(clean, {"batch_index": [3, 4], "other": 1})
    assert samples_of(latent) is clean
    assert latent["batch_index"] == [3, 4]
    assert latent.z is None
    torch.testing.assert_close(latent_in(latent, toy(), 0.0), clean * 0.3)
    assert reads == []
    assert "batch_index" not in finished_out(clean[:1], latent)


def test_a_wrong_level_is_refused() -> None:
    latent = latent_out(random_z(), toy(), SIGMA, {})
    with pytest.raises(MismatchError, match=r"0\.6 but this step starts at 0\.3"):
        latent_in(latent, toy(), 0.3)
    with pytest.raises(MismatchError, match="sigma 0 but"):
        latent_in(finished_out(random_z(), {}), toy(), 0.3)


def test_pure_flow_noise(reads: list[str]) -> None:
    z, denoiser = random_z(), toy(flow=True)
    latent = latent_out(z, denoiser, 1.0, {})
    assert latent_in(latent, denoiser, 1.0) is z
    assert torch.isfinite(samples_of(latent)).all()
    with pytest.raises(MismatchError, match="pure noise"):
        latent_in({"samples": random_z()}, denoiser, 1.0)


@pytest.mark.parametrize(
    "write",
    [
        lambda d, value: d.__setitem__("samples", value),
        lambda d, value: d.update(samples=value),
        lambda d, value: d.update({"samples": value}),
        lambda d, value: d.__ior__({"samples": value}),
    ],
)
def test_writing_makes_it_ordinary(write: Callable[[DeviceLatent, Tensor], None]) -> None:
    latent = latent_out(random_z(), toy(), SIGMA, {})
    shared, value = latent.copy(), torch.zeros(1)
    write(shared, value)
    assert shared["samples"] is value
    assert shared.z is None
    assert dict(shared)["samples"] is value
    assert shared.copy()["samples"] is value
    assert latent.z is not None  # the original is another dict


def test_removing_and_adding_again() -> None:
    latent = latent_out(random_z(), toy(), SIGMA, {"a": 1})
    del latent["samples"]
    assert "samples" not in latent
    assert latent.z is None
    assert latent.pop("samples", None) is None
    with pytest.raises(KeyError):
        latent.pop("samples")
    latent.setdefault("samples", 5)
    assert latent["samples"] == 5
    latent.clear()
    assert len(latent) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda latent: pickle.loads(pickle.dumps(latent))])
def test_deep_copies_and_pickles_are_ordinary_dicts_that_share_nothing(copied: Callable) -> None:
    z = random_z()
    latent = latent_out(z, toy(), SIGMA, {"mask": torch.ones(2)})
    twin = copied(latent)
    assert type(twin) is dict
    torch.testing.assert_close(twin["samples"], z / 0.3)
    twin["samples"].zero_()
    twin["mask"].zero_()
    assert latent["samples"].abs().sum() > 0
    assert latent.z.abs().sum() > 0
    assert latent["mask"].sum() == 2


def test_shallow_copies_are_separate_dicts() -> None:
    latent = latent_out(random_z(), toy(), SIGMA, {"a": 1})
    for shared in (latent.copy(), copy.copy(latent), latent | {"b": 2}):
        assert shared.z is latent.z
        shared["a"] = 3
        del shared["samples"]
        assert latent["a"] == 1
        assert latent.z is not None


def test_what_is_no_latent_is_refused() -> None:
    with pytest.raises(ShapeError, match="connect a LATENT"):
        samples_of({"noise": 1})
    with pytest.raises(ParameterError, match="latent or vae"):
        latent_grid(torch.zeros(1, 8, 8), None, None)
