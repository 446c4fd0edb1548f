"""Every registered network: parameter names and counts, maps, initialisation, and that nothing hidden happens."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mdistiller_norm.errors import ConfigError
from mdistiller_norm.models import CIFAR_MODELS, IMAGENET_MODELS, Network, build_model, probe

FACTS = Path(__file__).resolve().parents[2] / "shared" / "facts" / "models.json"

# Parameters with 100 classes (CIFAR) or 1000 (ImageNet), channels of the maps, width of the classifier's input.
KNOWN: dict[tuple[str, str], tuple[int, list[int], int]] = {
    ("cifar", "resnet8"): (83_892, [16, 16, 32, 64], 64),
    ("cifar", "resnet14"): (181_108, [16, 16, 32, 64], 64),
    ("cifar", "resnet20"): (278_324, [16, 16, 32, 64], 64),
    ("cifar", "resnet32"): (472_756, [16, 16, 32, 64], 64),
    ("cifar", "resnet44"): (667_188, [16, 16, 32, 64], 64),
    ("cifar", "resnet56"): (861_620, [16, 16, 32, 64], 64),
    ("cifar", "resnet110"): (1_736_564, [16, 16, 32, 64], 64),
    ("cifar", "resnet8x4"): (1_233_540, [32, 64, 128, 256], 256),
    ("cifar", "resnet32x4"): (7_433_860, [32, 64, 128, 256], 256),
    ("cifar", "ResNet18"): (11_220_132, [64, 64, 128, 256, 512], 512),
    ("cifar", "ResNet34"): (21_328_292, [64, 64, 128, 256, 512], 512),
    ("cifar", "ResNet50"): (23_705_252, [64, 256, 512, 1024, 2048], 2048),
    ("cifar", "wrn_16_1"): (180_916, [16, 16, 32, 64], 64),
    ("cifar", "wrn_16_2"): (703_284, [16, 32, 64, 128], 128),
    ("cifar", "wrn_40_1"): (569_780, [16, 16, 32, 64], 64),
    ("cifar", "wrn_40_2"): (2_255_156, [16, 32, 64, 128], 128),
    ("cifar", "vgg8"): (3_965_028, [64, 128, 256, 512, 512], 512),
    ("cifar", "vgg11"): (9_277_284, [64, 128, 256, 512, 512], 512),
    ("cifar", "vgg13"): (9_462_180, [64, 128, 256, 512, 512], 512),
    ("cifar", "vgg16"): (14_774_436, [64, 128, 256, 512, 512], 512),
    ("cifar", "vgg19"): (20_086_692, [64, 128, 256, 512, 512], 512),
    ("cifar", "MobileNetV2"): (812_836, [16, 12, 16, 48, 160], 1280),
    ("cifar", "ShuffleV1"): (949_258, [24, 240, 480, 960], 960),
    ("cifar", "ShuffleV2"): (1_355_528, [24, 116, 232, 464], 1024),
    ("imagenet", "ResNet18"): (11_689_512, [64, 64, 128, 256, 512], 512),
    ("imagenet", "ResNet34"): (21_797_672, [64, 64, 128, 256, 512], 512),
    ("imagenet", "ResNet50"): (25_557_032, [64, 256, 512, 1024, 2048], 2048),
    ("imagenet", "ResNet101"): (44_549_160, [64, 256, 512, 1024, 2048], 2048),
    ("imagenet", "MobileNetV1"): (4_231_976, [128, 256, 512, 1024], 1024),
}
EVERY = pytest.mark.parametrize(("variant", "name"), list(KNOWN))
# The smallest of each family: enough where depth and width do not matter.
FAMILIES = [
    ("cifar", "resnet8x4"),
    ("cifar", "ResNet18"),
    ("cifar", "wrn_16_2"),
    ("cifar", "vgg8"),
    ("cifar", "MobileNetV2"),
    ("cifar", "ShuffleV1"),
    ("cifar", "ShuffleV2"),
    ("imagenet", "ResNet18"),
    ("imagenet", "MobileNetV1"),
]
EACH_FAMILY = pytest.mark.parametrize(("variant", "name"), FAMILIES)


def build(variant: str, name: str, device: str = "meta") -> Network:
    with torch.device(device):
        return build_model(name, 100 if variant == "cifar" else 1000, variant=variant)


def sizes(maps: tuple[Tensor, ...]) -> list[list[int]]:
    return [list(each.shape[1:]) for each in maps]


def images(variant: str, batch: int = 2) -> Tensor:
    size = 32 if variant == "cifar" else 64
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def unsettle_norms(network: nn.Module) -> None:
    """Norms as after some training: fresh ones hide a norm that is missing or in the wrong place."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.0, generator=generator)
            nn.init.normal_(module.bias, 0, 0.1, generator=generator)


def facts_of(variant: str, name: str) -> dict[str, Any]:
    if not FACTS.exists():
        pytest.skip(f"no {FACTS}")
    found: dict[str, Any] = json.loads(FACTS.read_text())["cifar100" if variant == "cifar" else variant]
    if name not in found:
        pytest.skip(f"{name} has no entry in {FACTS.name}")
    return found[name]


def test_the_table_above_names_every_registered_model() -> None:
    registered = [("cifar", name) for name in CIFAR_MODELS] + [("imagenet", name) for name in IMAGENET_MODELS]
    assert sorted(registered) == sorted(KNOWN)


@EVERY
def test_parameters_and_maps(variant: str, name: str) -> None:
    n_params, channels, pooled = KNOWN[variant, name]
    network = build(variant, name)
    assert sum(parameter.numel() for parameter in network.parameters()) == n_params
    side = 32 if variant == "cifar" else 224
    outputs = probe(network, (side, side))
    assert [size[0] for size in sizes(outputs.features)] == channels
    assert sizes(outputs.preacts) == sizes(outputs.features)
    assert outputs.pooled.shape == (2, pooled)
    assert outputs.logits.shape == (2, network.num_classes)


@EVERY
def test_facts_of_the_reference(variant: str, name: str) -> None:
    facts = facts_of(variant, name)
    network = build(variant, name)
    state = [[key, list(tensor.shape)] for key, tensor in network.state_dict().items()]
    assert len(state) == facts["n_state_dict_keys"]
    if "state_dict" in facts:
        assert state == facts["state_dict"]
    side = 32 if variant == "cifar" else 224
    outputs = probe(network, (side, side))
    assert sizes(outputs.features) == facts["feats_shapes_CHW"]
    assert list(outputs.pooled.shape[1:]) == facts["pooled_feat_shape"]
    with FlopCounterMode(display=False) as counter:
        network.eval()(torch.empty(1, 3, side, side, device="meta"))
    assert counter.get_total_flops() == 2 * facts["macs_one_image"]["total"]
    reference = facts.get("get_bn_before_relu")
    if isinstance(reference, list):
        names = {module: key for key, module in network.named_modules()}
        found = [None if norm is None else names[norm] for norm in network.norms_before_relu()]
        assert found[-len(reference) :] == [each["module"] for each in reference]


@EVERY
def test_other_sizes_and_every_parameter_learns(variant: str, name: str) -> None:
    network = build(variant, name)
    side = 64 if variant == "cifar" else 160
    outputs = network.outputs(torch.empty(3, 3, side, side, device="meta"))
    assert outputs.logits.shape == (3, network.num_classes)
    assert outputs.pooled.shape == (3, KNOWN[variant, name][2])
    outputs.logits.sum().backward()
    assert [key for key, parameter in network.named_parameters() if parameter.grad is None] == []


@EVERY
def test_traces_symbolically(variant: str, name: str) -> None:
    network = build(variant, name).eval()
    traced = torch.fx.symbolic_trace(network)
    side = 32 if variant == "cifar" else 224
    assert traced(torch.empty(2, 3, side, side, device="meta")).shape == (2, network.num_classes)


@EVERY
def test_forward_and_activations(variant: str, name: str) -> None:
    network = build(variant, name, "cpu")
    unsettle_norms(network)
    network.eval()
    with torch.no_grad():
        logits, features, preacts, pooled = network.outputs(images(variant))
        assert torch.equal(network(images(variant)), logits)
    assert logits.isfinite().all()
    assert logits.std() > 0
    stem_is_activated = not (variant == "imagenet" or name.startswith("wrn"))
    if name == "MobileNetV2":
        assert all(torch.equal(feature, preact) for feature, preact in zip(features, preacts, strict=True))
    elif name.startswith("wrn"):
        assert torch.equal(features[0], preacts[0])
        torch.testing.assert_close(F.relu(preacts[-1]).mean((2, 3)), pooled)
    else:
        assert all(torch.equal(feature, preact.relu()) for feature, preact in zip(features, preacts, strict=True))
        assert [bool((preact < 0).any()) for preact in preacts] == [not stem_is_activated] + [True] * (len(preacts) - 1)
    if name not in {"MobileNetV2", "ShuffleV2"} and not name.startswith("wrn"):
        torch.testing.assert_close(features[-1].mean((2, 3)), pooled)


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("wrn_16_2", ["conv1", "block1", "block2", "block3"]),
        ("MobileNetV2", ["conv1", "blocks.1", "blocks.2", "blocks.4", "blocks.6"]),
    ],
)
def test_nothing_downstream_writes_into_a_raw_feature(name: str, modules: list[str]) -> None:
    network = build("cifar", name, "cpu")
    seen: list[Tensor] = []
    for module in modules:
        network.get_submodule(module).register_forward_hook(
            lambda module, inputs, out: seen.append((out[0] if isinstance(out, tuple) else out).clone())
        )
    features = network.outputs(images("cifar")).features
    assert all(torch.equal(feature, before) for feature, before in zip(features, seen, strict=True))


@pytest.mark.parametrize(("variant", "name"), [("cifar", "vgg13"), ("cifar", "wrn_40_1"), ("imagenet", "MobileNetV1")])
def test_preacts_are_outputs_of_their_norms(variant: str, name: str) -> None:
    network = build(variant, name, "cpu")
    seen: dict[nn.Module, Tensor] = {}
    norms = network.norms_before_relu()
    for norm in norms:
        if norm is not None:
            norm.register_forward_hook(lambda module, inputs, out: seen.__setitem__(module, out.clone()))
    preacts = network.outputs(images(variant)).preacts
    assert [norm is None for norm in norms] == [variant == "cifar"] + [False] * (len(preacts) - 1)
    assert all(norm is None or torch.equal(preact, seen[norm]) for norm, preact in zip(norms, preacts, strict=True))


@EVERY
def test_norms_before_relu_fit_their_maps(variant: str, name: str) -> None:
    network = build(variant, name)
    norms, (_, channels, _) = network.norms_before_relu(), KNOWN[variant, name]
    assert len(norms) == len(channels)
    assert all(norm is None or norm.num_features == width for norm, width in zip(norms, channels, strict=True))
    assert (norms[-1] is None) == (name == "ShuffleV2")


@EACH_FAMILY
def test_every_norm_runs_once(variant: str, name: str) -> None:
    network = build(variant, name, "cpu").train()
    network.outputs(images(variant))
    counts = {key: int(value) for key, value in network.state_dict().items() if key.endswith("num_batches_tracked")}
    assert counts
    assert set(counts.values()) == {1}


@EACH_FAMILY
def test_initialisation(variant: str, name: str) -> None:
    torch.manual_seed(0)
    network = build(variant, name, "cpu")
    he = name not in {"ShuffleV1", "ShuffleV2", "MobileNetV1"}
    ratios, flatness = [], []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            area = math.prod(module.kernel_size)
            default = 1 / math.sqrt(3 * area * module.in_channels / module.groups)
            expected = math.sqrt(2 / (area * module.out_channels)) if he else default
            ratios.append(module.weight.std().item() / expected)
            flatness.append(((module.weight / module.weight.std()) ** 4).mean().item())
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()
            assert (module.eps, module.momentum) == (1e-5, 0.1)
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.03)
    assert sum(flatness) / len(flatness) == pytest.approx(3 if he else 1.8, abs=0.1)  # normal or uniform
    linear = next(module for module in network.modules() if isinstance(module, nn.Linear))
    small = name in {"vgg8", "MobileNetV2"}
    assert linear.weight.std().item() == pytest.approx(
        0.01 if small else 1 / math.sqrt(3 * linear.in_features), rel=0.03
    )
    assert bool(linear.bias.any()) != (small or name.startswith("wrn"))


@pytest.mark.parametrize("name", ["ResNet18", "ResNet34", "ResNet50"])
def test_imagenet_resnets_are_torchvisions(name: str) -> None:
    theirs = torchvision.models.get_model(name.lower(), weights=None)
    unsettle_norms(theirs)
    ours = build("imagenet", name)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        expected = theirs.eval()(images("imagenet"))
        torch.testing.assert_close(
            ours.eval()(images("imagenet")), expected, rtol=1e-5, atol=1e-5 * expected.abs().max()
        )


@EACH_FAMILY
def test_channels_last_gives_the_same(variant: str, name: str) -> None:
    network = build(variant, name, "cpu").eval()
    with torch.no_grad():
        expected = network(images(variant))
        found = network.to(memory_format=torch.channels_last)(images(variant).to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@EACH_FAMILY
def test_compiles_without_a_graph_break(variant: str, name: str) -> None:
    network = build(variant, name).eval()
    torch.compiler.reset()
    compiled = torch.compile(network.outputs, backend="eager", fullgraph=True)
    outputs = compiled(torch.empty(2, 3, 64, 64, device="meta"))
    assert sizes(outputs.features) == sizes(network.outputs(torch.empty(2, 3, 64, 64, device="meta")).features)


@EACH_FAMILY
@pytest.mark.parametrize("training", [True, False])
def test_probe_touches_nothing(variant: str, name: str, training: bool) -> None:
    network = build(variant, name, "cpu").train(training)
    state, versions = copy.deepcopy(network.state_dict()), [each._version for each in network.state_dict().values()]
    rng = torch.get_rng_state()
    outputs = probe(network, (64, 64))
    assert all(each.is_meta for each in (outputs.logits, outputs.pooled, *outputs.features, *outputs.preacts))
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(module.training == training for module in network.modules())
    assert [each._version for each in network.state_dict().values()] == versions
    assert all(torch.equal(each, state[key]) for key, each in network.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())


def test_build_model_knows_what_it_built() -> None:
    network = build_model("ResNet18", 7, variant="imagenet")
    assert (network.name, network.num_classes) == ("ResNet18", 7)
    assert network.get_submodule("fc").out_features == 7
    assert build_model("ResNet18", 7).get_submodule("linear").out_features == 7


def test_same_seed_same_weights() -> None:
    def weights() -> list[Tensor]:
        torch.manual_seed(3)
        return list(build_model("resnet8", 10).parameters())

    assert all(torch.equal(one, other) for one, other in zip(weights(), weights(), strict=True))


@pytest.mark.parametrize(
    ("name", "num_classes", "variant", "message"),
    [
        ("resnet65", 100, "cifar", "resnet56"),
        ("shufflev3", 100, "cifar", "ShuffleV1"),
        ("MobileNetV1", 100, "cifar", "'MobileNetV1' requires DATASET.VARIANT imagenet.*MobileNetV2"),
        ("resnet8x4", 3, "imagenet", "'resnet8x4' requires DATASET.VARIANT cifar.*ResNet34"),
        ("ResNet18", 100, "imagnet", "imagenet"),
        ("resnet20", 1, "cifar", "at least 2"),
    ],
)
def test_build_model_errors(name: str, num_classes: int, variant: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_model(name, num_classes, variant=variant)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(4, 4), (0, 32), (32, -1)])
def test_probe_names_network_and_size(size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=rf"'vgg8' cannot take images of {size[0]}x{size[1]} pixels") as caught:
        probe(build("cifar", "vgg8"), size)
    assert "\n" not in str(caught.value)
