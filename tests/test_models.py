"""The networks: parameters, maps, initialisation, tracing, probing and errors."""

import json
import math

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mdistiller_norm.errors import ConfigError
from mdistiller_norm.models import CIFAR_MODELS, IMAGENET_MODELS, build_model, probe

# Number of parameters with 100 classes (CIFAR) or 1000 (ImageNet).
PARAMETERS = {
    ("cifar", "resnet8"): 83_892, ("cifar", "resnet14"): 181_108, ("cifar", "resnet20"): 278_324,
    ("cifar", "resnet32"): 472_756, ("cifar", "resnet44"): 667_188, ("cifar", "resnet56"): 861_620,
    ("cifar", "resnet110"): 1_736_564, ("cifar", "resnet8x4"): 1_233_540, ("cifar", "resnet32x4"): 7_433_860,
    ("cifar", "ResNet18"): 11_220_132, ("cifar", "ResNet34"): 21_328_292, ("cifar", "ResNet50"): 23_705_252,
    ("cifar", "wrn_16_1"): 180_916, ("cifar", "wrn_16_2"): 703_284, ("cifar", "wrn_40_1"): 569_780,
    ("cifar", "wrn_40_2"): 2_255_156, ("cifar", "vgg8"): 3_965_028, ("cifar", "vgg11"): 9_277_284,
    ("cifar", "vgg13"): 9_462_180, ("cifar", "vgg16"): 14_774_436, ("cifar", "vgg19"): 20_086_692,
    ("cifar", "MobileNetV2"): 812_836, ("cifar", "ShuffleV1"): 949_258, ("cifar", "ShuffleV2"): 1_355_528,
    ("imagenet", "ResNet18"): 11_689_512, ("imagenet", "ResNet34"): 21_797_672, ("imagenet", "ResNet50"): 25_557_032,
    ("imagenet", "ResNet101"): 44_549_160, ("imagenet", "MobileNetV1"): 4_231_976,
}  # fmt: skip
# The smallest of each family, for tests in which depth and width do not matter.
SMALL = ["resnet8x4", "ResNet18", "wrn_16_2", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"]
FAMILIES = [("cifar", name) for name in SMALL]
FAMILIES += [("imagenet", "ResNet18"), ("imagenet", "MobileNetV1")]
EVERY = pytest.mark.parametrize(("variant", "name"), PARAMETERS)
EACH_FAMILY = pytest.mark.parametrize(("variant", "name"), FAMILIES)
EACH_BLOCK = pytest.mark.parametrize(("variant", "name"), [*FAMILIES, ("cifar", "ResNet50")])


def build(variant, name, device="meta"):
    with torch.device(device):
        return build_model(name, 100 if variant == "cifar" else 1000, variant=variant)


def sizes(maps):
    return [list(each.shape[1:]) for each in maps]


def images(variant):
    size = 32 if variant == "cifar" else 64
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def norms_in(network):
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def randomise_norms(network):
    """Set the norms as after some training: new ones hide a norm that is missing or in the wrong place."""
    generator = torch.Generator().manual_seed(1)
    for norm in norms_in(network):
        norm.running_mean.normal_(0, 0.1, generator=generator)
        norm.running_var.uniform_(0.5, 1.5, generator=generator)
        nn.init.uniform_(norm.weight, 0.5, 1.0, generator=generator)
        nn.init.normal_(norm.bias, 0, 0.1, generator=generator)


@EVERY
def test_facts_of_the_reference(variant, name, facts):
    known = json.loads((facts / "models.json").read_text())
    expected = known["cifar100" if variant == "cifar" else variant].get(name)
    if expected is None:
        pytest.skip(f"{name} has no entry in models.json")
    network = build(variant, name)
    side = 32 if variant == "cifar" else 224
    outputs = probe(network, (side, side))
    state = [[key, list(tensor.shape)] for key, tensor in network.state_dict().items()]
    assert len(state) == expected["n_state_dict_keys"]
    assert state == expected.get("state_dict", state)
    assert sizes(outputs.features) == expected["feats_shapes_CHW"]
    assert list(outputs.pooled.shape[1:]) == expected["pooled_feat_shape"]
    with FlopCounterMode(display=False) as counter:
        network.eval()(torch.empty(1, 3, side, side, device="meta"))
    assert counter.get_total_flops() == 2 * expected["macs_one_image"]["total"]
    reference = expected.get("get_bn_before_relu")
    if isinstance(reference, list):
        names = {module: key for key, module in network.named_modules()}
        found = [None if norm is None else names[norm] for norm in network.norms_before_relu()]
        assert found[-len(reference) :] == [each["module"] for each in reference]


def test_number_of_parameters():
    assert {name for _, name in PARAMETERS} == {*CIFAR_MODELS, *IMAGENET_MODELS}
    for (variant, name), expected in PARAMETERS.items():
        parameters = build(variant, name).parameters()
        assert sum(parameter.numel() for parameter in parameters) == expected, name


@EACH_BLOCK
def test_norms_sizes_and_tracing(variant, name):
    network = build(variant, name)
    side = 64 if variant == "cifar" else 160
    outputs = network.outputs(torch.empty(3, 3, side, side, device="meta"))
    assert outputs.logits.shape == (3, network.num_classes)
    assert sizes(outputs.preacts) == sizes(outputs.features)
    norms = network.norms_before_relu()
    for norm, maps in zip(norms, outputs.preacts, strict=True):
        assert norm is None or norm.num_features == maps.shape[1]
    assert (norms[-1] is None) == (name == "ShuffleV2")
    outputs.logits.sum().backward()
    assert [key for key, parameter in network.named_parameters() if parameter.grad is None] == []
    traced = torch.fx.symbolic_trace(network.eval())
    side = 32 if variant == "cifar" else 224
    assert traced(torch.empty(2, 3, side, side, device="meta")).shape == (2, network.num_classes)


@EACH_BLOCK
def test_forward_and_activations(variant, name):
    network = build(variant, name, "cpu").train()
    network.outputs(images(variant))
    assert all(norm.num_batches_tracked == 1 for norm in norms_in(network))
    randomise_norms(network)
    network.eval()
    with torch.no_grad():
        logits, features, preacts, pooled = network.outputs(images(variant))
        assert torch.equal(network(images(variant)), logits)
    assert logits.isfinite().all()
    assert logits.std() > 0
    if name == "MobileNetV2":
        assert all(map(torch.equal, features, preacts))
        # An activation in place overwrites them.
        assert all((each < 0).any() for each in features[1:])
    elif name.startswith("wrn"):
        assert torch.equal(features[0], preacts[0])
        assert all((each < 0).any() for each in features)
        torch.testing.assert_close(F.relu(preacts[-1]).mean((2, 3)), pooled)
    else:
        assert all(map(torch.equal, features, map(F.relu, preacts)))
        negative = [bool((preact < 0).any()) for preact in preacts]
        assert negative == [variant == "imagenet"] + [True] * (len(preacts) - 1)
    if name not in {"MobileNetV2", "ShuffleV2"} and not name.startswith("wrn"):
        torch.testing.assert_close(features[-1].mean((2, 3)), pooled)


@EACH_FAMILY
def test_initialisation(variant, name):
    network = build(variant, name, "cpu")
    he = name not in {"ShuffleV1", "ShuffleV2", "MobileNetV1"}
    ratios = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            area = math.prod(module.kernel_size)
            default = 1 / math.sqrt(3 * area * module.in_channels / module.groups)
            expected = math.sqrt(2 / (area * module.out_channels)) if he else default
            ratios.append(module.weight.std().item() / expected)
            assert module.bias is None or not module.bias.any()
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.03)
    linear = next(module for module in network.modules() if isinstance(module, nn.Linear))
    small = name in {"vgg8", "MobileNetV2"}
    spread = 0.01 if small else 1 / math.sqrt(3 * linear.in_features)
    assert linear.weight.std().item() == pytest.approx(spread, rel=0.03)
    assert bool(linear.bias.any()) != (small or name.startswith("wrn"))


@pytest.mark.parametrize("name", ["ResNet18", "ResNet50"])
def test_imagenet_resnets_equal_torchvision(name):
    theirs = torchvision.models.get_model(name.lower(), weights=None)
    ours = build("imagenet", name)
    randomise_norms(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        expected, found = (network.eval()(images("imagenet")) for network in (theirs, ours))
    allowed = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=allowed)


@pytest.mark.parametrize(
    ("name", "num_classes", "variant", "message"),
    [
        ("MobileNetV1", 100, "cifar", "requires DATASET.VARIANT imagenet.*MobileNetV2"),
        ("resnet8x4", 3, "imagenet", "'resnet8x4' requires DATASET.VARIANT cifar.*ResNet34"),
        ("ResNet18", 100, "imagnet", "imagenet"),
        ("resnet20", 1, "cifar", "at least 2"),
        ("vgg8", 10, "cifar", "'vgg8' cannot take images of size .4, 4."),
    ],
)
def test_errors(name, num_classes, variant, message):
    with pytest.raises(ConfigError, match=message):
        probe(build_model(name, num_classes, variant=variant), (4, 4))
