"""A trained network as a file for people without this package: ``torch.export``, ONNX, or a bare state dict.

Every file is loaded again and compared with the network before it gets its name.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mdistiller_norm.build import open_checkpoint
from mdistiller_norm.engine.checkpoint import load_into, load_weights
from mdistiller_norm.errors import CheckpointError, ConfigError, DataError, first_line
from mdistiller_norm.files import whole_file
from mdistiller_norm.models import build_model
from mdistiller_norm.models.base import Network
from mdistiller_norm.plugins import import_plugin

# The first suffix of a format is the default.
FORMATS = {"pt2": (".pt2",), "onnx": (".onnx",), "state_dict": (".pth", ".pt")}
# Of a logit, relative to the largest of its batch: other kernels sum in another order, and a wrong file is far off.
TOLERANCE = 1e-4
ABOUT = "about.json"  # the extra file inside a .pt2
_KNOWN = ("name", "variant", "dataset", "classes", "mean", "std", "image_size")

Run = Callable[[Tensor], Tensor]


class Subject(NamedTuple):
    """What is exported.

    Attributes:
        network: in eval mode, on the CPU.
        about: its name, variant, data set, classes, mean, std, image_size, and top1 where that is known.
        real: normalised images of the test split, ``[N, 3, H, W]``; None where they are not on this machine.
        missing: why not, or empty.
    """

    network: Network
    about: dict[str, Any]
    real: Tensor | None
    missing: str = ""

    @property
    def mean(self) -> Tensor:
        """Of the channels, of pixels in [0, 1]: ``[3, 1, 1]``."""
        return torch.tensor(self.about["mean"])[:, None, None]

    @property
    def std(self) -> Tensor:
        """Likewise."""
        return torch.tensor(self.about["std"])[:, None, None]


class WithNormalisation(nn.Module):
    """A network that takes pixels in [0, 1] and normalises them itself.

    Args:
        subject: the network, its mean and its standard deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.network = subject.network
        self.register_buffer("mean", subject.mean)
        self.register_buffer("std", subject.std)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, C]`` of RGB ``images`` ``[B, 3, H, W]``."""
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits


def open_subject(path: Path, model: str, kind: str, root: Path, count: int) -> Subject:
    """The network of a weights file, and real images to check its export on.

    The images may be missing if the file knows what else the data set says of the network, as a ``student_*.pt`` does.

    Args:
        path: the weights file.
        model: see :func:`~mdistiller_norm.build.open_checkpoint`, as the next two.
        kind: of the data set.
        root: folder of the data sets.
        count: images wanted; fewer where the test split has fewer.

    Raises:
        UserError: see :func:`~mdistiller_norm.build.open_checkpoint`.
    """
    weights = load_weights(path)
    about, known = weights.about, all(key in weights.about for key in _KNOWN)
    try:
        if known and (kind or about.get("type")) == "cifar100" and not (root / "cifar-100-python").exists():
            raise DataError(f"there is no {root / 'cifar-100-python'}")  # not worth a download
        network, dataset = open_checkpoint(path, model, kind, root)
        real, _ = next(iter(dataset.eval_loader(count, torch.device("cpu"))))
    except DataError as error:
        if not known:
            raise
        network = build_model(model or about["name"], len(about["classes"]), variant=about["variant"])
        load_into(network, weights, f"{network.name} with {network.num_classes} classes")
        return Subject(network.eval(), _facts(about, network), None, str(error))
    facts = {
        "variant": dataset.variant, "dataset": dataset.name, "classes": list(dataset.classes),
        "mean": list(dataset.mean), "std": list(dataset.std), "image_size": list(dataset.image_size),
    }  # fmt: skip
    return Subject(network.eval(), _facts(about | facts, network), real)


def _facts(about: dict[str, Any], network: Network) -> dict[str, Any]:
    """What a consumer of the file wants to know."""
    return {key: about[key] for key in (*_KNOWN, "top1") if key in about} | {"name": network.name}


def export(subject: Subject, path: Path, form: str, with_normalisation: bool) -> list[str]:
    """Write a network, load the file again, and give it its name if its logits are the network's.

    Args:
        subject: the network.
        path: of the file; one that is there is replaced, and stays as it is if anything fails.
        form: a key of :data:`FORMATS`.
        with_normalisation: the file takes pixels in [0, 1], not normalised ones.

    Returns:
        What the check found, in lines.

    Raises:
        CheckpointError: the file cannot be written, or its logits differ by more than rounding.
        ConfigError: the network cannot be traced.
    """
    content_of, reader = _FORMS[form]
    taken = "RGB in 0..1" if with_normalisation else "RGB in 0..1, minus mean, divided by std"
    about = subject.about | {"input": f"float32 [B, 3, {', '.join(map(str, subject.about['image_size']))}], {taken}"}
    module = WithNormalisation(subject).eval() if with_normalisation else subject.network
    try:
        with whole_file(path) as file:
            file.write(content_of(module, about))
            file.flush()
            lines = check(reader(Path(file.name), subject), subject, with_normalisation)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written ({error})") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not written: {error}") from error
    return [f"{path}: {subject.network.name}, {len(about['classes'])} classes, input {about['input']}", *lines]


def check(run: Run, subject: Subject, with_normalisation: bool, count: int = 16) -> list[str]:
    """Compare an export with its network, on one image and on many, random and real.

    Args:
        run: the exported network.
        subject: the network itself, and the real images.
        with_normalisation: what ``run`` takes, see :func:`export`.
        count: random images.

    Returns:
        The largest differences, a line for each kind of images.

    Raises:
        CheckpointError: a logit differs by more than :data:`TOLERANCE`, or is not finite.
    """
    mean, std = subject.mean, subject.std
    pixels = torch.rand(count, 3, *subject.about["image_size"], generator=torch.Generator().manual_seed(0))
    kinds = {"random": (pixels - mean) / std, str(subject.about["dataset"]): subject.real}
    lines = []
    for kind, images in kinds.items():
        if images is None:
            lines.append(f"checked on random images only: {subject.missing}")
            continue
        largest = 0.0
        for batch in (images[:1], images):
            with torch.no_grad():
                expected = subject.network(batch)
                difference = (run(batch * std + mean if with_normalisation else batch) - expected).abs().max().item()
            if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
                raise CheckpointError(f"on {kind} images its logits differ by {difference:.2g} from the network's own")
            largest = max(largest, difference)
        lines.append(f"largest difference of a logit: {largest:.2g} on {kind} images, batches of 1 and {len(images)}")
    return lines


def _trace(module: nn.Module, about: dict[str, Any]) -> torch.export.ExportedProgram:
    example = torch.zeros(2, 3, *about["image_size"])  # of 2: a batch of 1 would be taken for a constant
    batch = torch.export.Dim("batch", min=1)
    try:
        return torch.export.export(module, (example,), dynamic_shapes=({0: batch},), strict=False)
    # Whatever a network of a user's own does that cannot be traced.
    except Exception as error:
        reason = first_line(error)
        raise ConfigError(f"{about['name']} cannot be traced ({reason}): --format state_dict needs no trace") from error


# The files as bytes: torch's own writers end the process when the disk is full.


def _pt2(module: nn.Module, about: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    torch.export.save(_trace(module, about), content, extra_files={ABOUT: json.dumps(about)})
    return content.getvalue()


def _read_pt2(path: Path, subject: Subject) -> Run:
    with path.open("rb") as file:
        module: Run = torch.export.load(file).module()
    return module


def _onnx(module: nn.Module, about: dict[str, Any]) -> bytes:
    traced = _trace(module, about)
    try:
        program = torch.onnx.export(traced, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False)
    except Exception as error:  # an operation that ONNX lacks, in a network of a user's own
        cause: BaseException = error
        while cause.__cause__:  # the first one names the operation
            cause = cause.__cause__
        reason = first_line(cause)
        raise ConfigError(f"{about['name']} has no form in ONNX ({reason}): choose --format pt2") from error
    assert program is not None
    for key, value in about.items():
        program.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    content: bytes = program.model_proto.SerializeToString()
    return content


def _read_onnx(path: Path, subject: Subject) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.contiguous().numpy()})[0])


def _state_dict(module: nn.Module, about: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    torch.save({"model": module.state_dict()}, content)
    return content.getvalue()


def _read_state_dict(path: Path, subject: Subject) -> Run:
    about = subject.about
    network = build_model(about["name"], len(about["classes"]), variant=about["variant"])
    load_into(network, load_weights(path), about["name"])
    return network.eval()


_FORMS: dict[str, tuple[Callable[[nn.Module, dict[str, Any]], bytes], Callable[[Path, Subject], Run]]] = {
    "pt2": (_pt2, _read_pt2),
    "onnx": (_onnx, _read_onnx),
    "state_dict": (_state_dict, _read_state_dict),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command ``export``."""
    parser.epilog = (
        "example: python tools/export.py -c output/digits/student_normkd/student_best.pt --with-normalisation"
    )
    parser.add_argument("-c", "--ckpt", required=True, type=Path, help="checkpoint file")
    parser.add_argument("-o", "--out", type=Path, help="file to write; else beside the checkpoint")
    parser.add_argument("--format", default="", help="pt2, onnx or state_dict; else that of -o's suffix, else pt2")
    parser.add_argument("--with-normalisation", action="store_true", help="the file takes pixels in 0..1")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    parser.add_argument("-m", "--model", default="", help="its name; a student_*.pt knows it")
    parser.add_argument("-d", "--dataset", default="", help="data set; a student_*.pt knows it; else cifar100")
    parser.add_argument("-bs", "--batch-size", type=int, default=64, help="real images that the file is checked on")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data set")
    parser.add_argument("--plugin", nargs="+", type=import_plugin, metavar="FILE", help="the run's EXPERIMENT.PLUGINS")


def main(options: argparse.Namespace) -> int:
    """Run the command ``export``."""
    if options.batch_size < 1:
        raise ConfigError(f"-bs must be at least 1, not {options.batch_size}")
    form = _format(options.format, options.out)
    path: Path = options.out or options.ckpt.with_suffix(FORMATS[form][0])
    if form == "state_dict" and options.with_normalisation:
        raise ConfigError("--with-normalisation: a state dict holds weights only: choose --format pt2 or onnx")
    if form == "onnx":
        _need_onnx()
    _writable(path, options.ckpt, options.force)
    subject = open_subject(options.ckpt, options.model, options.dataset, options.root, options.batch_size)
    print("\n".join(export(subject, path, form, options.with_normalisation)))
    return 0


def _format(name: str, out: Path | None) -> str:
    """The format that is asked for, by name or by suffix."""
    by_suffix = {suffix: form for form, suffixes in FORMATS.items() for suffix in suffixes}
    form = name or (by_suffix.get(out.suffix, "") if out else "pt2")
    if form not in FORMATS:
        unknown = f"--format {name!r}" if name else f"-o {out}: {out.suffix if out else ''!r}"
        raise ConfigError(
            f"{unknown} is not known: choose --format {', '.join(FORMATS)} or end in {', '.join(by_suffix)}"
        )
    if out and by_suffix.get(out.suffix, form) != form:
        raise ConfigError(f"-o {out} has the suffix of {by_suffix[out.suffix]}, and --format is {form}: change one")
    return form


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        packages = "onnx onnxscript onnxruntime"
        raise ConfigError(f"--format onnx: {error}: install it with `python -m pip install {packages}`") from error


def _writable(path: Path, source: Path, force: bool) -> None:
    """Refuse what would destroy or cannot be, before any work is done."""
    if not source.is_file():
        raise CheckpointError(f"there is no checkpoint {source}")
    if path.resolve() == source.resolve():
        raise ConfigError(f"-o {path} is the checkpoint itself: choose another name")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"-o {path} is a folder, or in one that is not there: name a file in one that is")
    if path.exists() and not force:
        raise ConfigError(f"{path} is there already: choose another -o, or replace it with --force")
