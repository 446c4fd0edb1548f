"""The command ``export``: write a trained network as a file that does not need this package."""

import argparse
import importlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from mdistiller_norm.engine.checkpoint import load_into, load_weights
from mdistiller_norm.errors import CheckpointError, ConfigError, first_line, needs_extra
from mdistiller_norm.files import whole_file, write_json, write_text
from mdistiller_norm.run_folder import RESULT
from mdistiller_norm.student import Student, build, find_weights, load_student

Forward = Callable[[Tensor], Tensor]
# Of a logit, relative to the largest of its batch: other kernels sum in another order.
TOLERANCE = 1e-4
ABOUT = "about.json"  # name of the metadata in a .pt2 and in ONNX
SUFFIXES = {
    ".pt2": "pt2", ".onnx": "onnx", ".pth": "state_dict", ".safetensors": "safetensors", ".pt": "state_dict",
}  # fmt: skip
EXECUTABLE = ("pt2", "onnx")  # formats that contain the network, not only its weights
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}


def export(
    student: Student, path: Path, form: str, count: int, with_normalisation: bool = False
) -> list[str]:
    """Write a network, load the file again, compare both, and return lines about the file.

    On failure an existing file is kept.

    Args:
        student: the network.
        path: file to write.
        form: format, a value of :data:`SUFFIXES`.
        count: number of test images to compare on.
        with_normalisation: include the normalisation, so that the input are pixels in [0, 1].

    Raises:
        CheckpointError: the file cannot be written, or its logits differ by more than rounding.
    """
    module: nn.Module = student.network
    mean, std = (
        torch.tensor(student.about[key]).expand(3)[:, None, None] for key in ("mean", "std")
    )
    pixels = "RGB in 0..1, minus mean, divided by std"
    if with_normalisation:
        norm = nn.BatchNorm2d(3, eps=0.0, affine=False)
        norm.running_mean, norm.running_var = mean.flatten(), std.flatten() ** 2
        module, pixels = nn.Sequential(norm, module).eval(), "RGB in 0..1"
    height, width = student.about["image_size"]
    shape = f"float32 [B, 3, {height}, {width}], {pixels}"
    about = student.about | {"normalised": not with_normalisation, "input": shape}

    def exported(images: Tensor) -> Tensor:
        return forward(images * std + mean if with_normalisation else images)

    try:
        with whole_file(path) as file:
            file.write(_encode(form, module, about))
            file.flush()
            forward, about = read(Path(file.name), form, about)
            lines = check(exported, student, count)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error})") from error
    classes = f"{len(about['classes'])} classes"
    return [f"{path}: {about['name']}, {classes}, input {about['input']}", *lines]


@torch.no_grad()
def check(forward: Forward, student: Student, count: int) -> list[str]:
    """Compare an export, a function of normalised images, with its network; return the largest differences in lines."""
    size, generator = student.about["image_size"], torch.Generator().manual_seed(0)
    kinds, lines = {"random": torch.randn(16, 3, *size, generator=generator)}, []
    if student.dataset:
        loader = student.dataset.eval_loader(count, torch.device("cpu"))
        kinds[student.about["dataset"]] = next(iter(loader))[0]
    for kind, images in kinds.items():
        expected, found = (
            torch.cat([network(batch) for batch in (images[:1], images)])
            for network in (student.network, forward)
        )
        difference = float((found - expected).abs().max())
        text = f"{difference:.2g} on {kind} images"
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise CheckpointError(f"nothing is written: logits of the export differ by {text}")
        lines.append(f"largest difference of a logit: {text}, batches of 1 and {len(images)}")
    if not student.dataset:
        lines.append(f"checked on random images only: {student.missing}")
    return lines


def _encode(form: str, module: nn.Module, about: dict[str, Any]) -> bytes:
    # In memory: PyTorch's writers of files abort the process if the disk is full.
    content = io.BytesIO()
    if form == "state_dict":
        torch.save({"model": module.state_dict()}, content)
        return content.getvalue()
    if form == "safetensors":
        from safetensors.torch import save

        tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
        return bytes(save(tensors, {"about": json.dumps(about)}))
    example = torch.zeros(2, 3, *about["image_size"])  # a batch of 1 would become a constant
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    try:
        program = torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)
        if form == "pt2":
            torch.export.save(program, content, extra_files={ABOUT: json.dumps(about)})
            return content.getvalue()
        onnx: Any = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["images"], output_names=["logits"]
        )
    except Exception as error:  # any error of a user's network; its cause names the operation
        reason = f"{about['name']} cannot be exported ({first_line(error.__cause__ or error)})"
        raise ConfigError(f"{reason}; use --format state_dict") from error
    for key, value in about.items():
        onnx.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    onnx.model.metadata_props[ABOUT] = json.dumps(about)
    return bytes(onnx.model_proto.SerializeToString())


def read(path: Path, form: str, about: Any = None) -> tuple[Forward, dict[str, Any]]:
    """Load an exported file as a function of images, with its metadata; weights alone require ``about``."""
    if form == "pt2":
        extra = {ABOUT: ""}
        with path.open("rb") as file:
            module = torch.export.load(file, extra_files=extra).module()
        return module, json.loads(extra[ABOUT])
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"images": images.contiguous().numpy()})[0])

        return run, json.loads(session.get_modelmeta().custom_metadata_map[ABOUT])
    network = build(about)
    if form == "state_dict":
        load_into(network, load_weights(path), about["name"])
    else:
        from safetensors.torch import load_file

        network.load_state_dict(load_file(path))
    return network.eval(), about


def write_hub_folder(
    student: Student, folder: Path, result: dict[str, Any], count: int
) -> list[str]:
    """Write a folder in the layout of the Hugging Face Hub: model.safetensors, config.json and a model card.

    ``result`` is the content of the run's ``result.json``, or empty; ``count`` as in :func:`export`.
    """
    about = student.about
    folder.mkdir(parents=True, exist_ok=True)
    lines = export(student, folder / "model.safetensors", "safetensors", count)
    facts = {"architecture": about["name"], "num_classes": len(about["classes"])}
    write_json(facts | about, folder / "config.json")
    header: dict[str, Any] = {
        "library_name": "mdistiller_norm",
        "pipeline_tag": "image-classification",
        "datasets": [about["dataset"]],
        "tags": ["knowledge-distillation", *result.get("method", [])],
    }  # fmt: skip
    description = "An image classifier."
    if result and "top1" in about:
        teacher, best, last = result.get("teacher"), result["best"], result["last"]
        method = "+".join(result["method"])
        source = f"with {method} from {teacher['name']}" if teacher else "without a teacher"
        description = (
            f"Trained {source} for {result['epochs']} epochs with seed {result['seed']}. Test top-1 of epoch "
            f"{best['epoch']}, the best: {best['top1']:.2f}; of the last epoch: {last['top1']:.2f}. "
            f"The weights are those of epoch {about['epoch']}."
        )
        header["model-index"] = [{"name": about["name"], "results": [{
            "task": {"type": "image-classification"},
            "dataset": {"name": about["dataset"], "type": about["dataset"]},
            "metrics": [{"type": "accuracy", "name": "top-1 (%)", "value": round(about["top1"], 2)}],
        }]}]  # fmt: skip
    start = yaml.safe_dump(header, sort_keys=False)
    template = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    card = template.format(**about, **facts, header=start, description=description)
    write_text(card, folder / "README.md")
    return [*lines, f"wrote config.json and README.md in {folder}"]


def main(options: argparse.Namespace) -> int:
    """Export a checkpoint; all options are checked before it is loaded."""
    source = find_weights(options.ckpt)
    form: str = options.format or (SUFFIXES.get(options.out.suffix, "") if options.out else "pt2")
    suffix = next((suffix for suffix, name in SUFFIXES.items() if name == form), "")
    path: Path = options.out or source.with_suffix(suffix)
    written = [path]
    if hub := options.push_folder:
        form, path = "safetensors", hub / "model.safetensors"
        written = [path, hub / "config.json", hub / "README.md"]
    existing = next((file for file in written if file.exists()), path)
    problems = {
        "--push-folder cannot be combined with -o or --format": hub and (options.out or options.format),
        f"-o {path} must be a file in an existing folder": not hub and (path.is_dir() or not path.parent.is_dir()),
        f"-o {path} must end in the suffix of its format: {', '.join(SUFFIXES)}": SUFFIXES.get(path.suffix) != form,
        "--with-normalisation requires --format pt2 or onnx: the others have weights only":
            options.with_normalisation and form not in EXECUTABLE,
        f"{existing} exists: choose another path, or replace it with --force":
            path.resolve() == source.resolve() or (existing.exists() and not options.force),
    }  # fmt: skip
    if found := [message for message, holds in problems.items() if holds]:
        raise ConfigError(found[0])
    with needs_extra(form, f"--format {form}"):
        for package in _PACKAGES.get(form, ()):
            importlib.import_module(package)
    student = load_student(source, options.model, options.dataset, options.root)
    if hub:
        file = source.parent / RESULT
        result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        lines = write_hub_folder(student, hub, result, options.batch_size)
    else:
        lines = export(student, path, form, options.batch_size, options.with_normalisation)
    print("\n".join(lines))
    return 0
