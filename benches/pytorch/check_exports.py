"""Checks that timm, PyTorch, onnxruntime, safetensors and pyarrow read what `selfie` writes, and compute what it computes.

    python3 check_exports.py --selfie ../../target/release/selfie

Installs what it needs (`requirements-exports.txt`) into a virtual environment, `--venv`, on its first run. Nothing here is
needed to build or use the project.

Trains small networks for a few steps on made-up images, exports them in every format, and lets the other programs load them
by the very lines that `selfie export` and `selfie inspect` print. All get the same images, as files; `selfie embed` and
`selfie predict` say what `selfie` makes of them. The bound: no further from timm's network in f64 than `ALLOWED` times
timm's own f32 is, or than the rounding of an f32, whichever is more.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ALLOWED = 4.0  # times PyTorch's own distance to f64, as in check_timm.py
IMAGES = 6

passed = 0


def bootstrap(folder: Path) -> None:
    """Goes on with the packages of the virtual environment."""
    python = folder / "bin" / "python"
    wanted = (HERE / "requirements-exports.txt").read_text()
    mark = folder / "installed.txt"
    if not mark.is_file() or mark.read_text() != wanted:
        venv.create(folder, with_pip=True)
        install = [python, "-m", "pip", "install", "--quiet", "-r", HERE / "requirements-exports.txt"]
        subprocess.run(install, check=True)
        mark.write_text(wanted)
    os.execv(python, [str(python), *sys.argv])


def expect(condition: bool, what: str) -> None:
    global passed
    if not condition:
        sys.exit("FAILED: " + what)
    passed += 1
    print("  ok  " + what)


class Selfie:
    """The binary."""

    def __init__(self, binary: Path) -> None:
        self.binary = binary

    def __call__(self, *arguments: object, code: int = 0) -> subprocess.CompletedProcess:
        line = [str(self.binary), *map(str, arguments)]
        ran = subprocess.run(line, capture_output=True, text=True)
        if ran.returncode != code:
            sys.exit(f"FAILED: {' '.join(line)} ended with {ran.returncode}\n{ran.stderr}")
        return ran

    def json(self, *arguments: object) -> dict:
        return json.loads(self(*arguments, "--json").stdout)


def write_images(folder: Path, side: int):
    """Noise, as files that need no decoder, and what a network for `side` pixels gets of them, [n, side, side, 3].

    An evaluation takes the central 7/8 of an image; of so large ones that is `side` pixels, and nothing is resized."""
    import numpy

    folder.mkdir(parents=True)
    whole, edge = side * 8 // 7, side // 14
    pixels = numpy.random.default_rng(0).integers(0, 256, (IMAGES, whole, whole, 3), dtype=numpy.uint8)
    for number, image in enumerate(pixels):
        (folder / f"{number}.ppm").write_bytes(f"P6\n{whole} {whole}\n255\n".encode() + image.tobytes())
    return numpy.ascontiguousarray(pixels[:, edge:-edge, edge:-edge])


def distance(found, expected) -> float:
    import numpy

    found, expected = numpy.asarray(found, "f8"), numpy.asarray(expected, "f8")
    if found.shape != expected.shape:
        sys.exit(f"FAILED: shape {found.shape} where {expected.shape} belongs")
    return float(numpy.linalg.norm(found - expected) / numpy.linalg.norm(expected))


def run_lines(lines: str, **names):
    """Runs printed lines as a person who pastes them would; gives their names."""
    exec(compile(lines, "printed lines", "exec"), names)
    return names


def timm_outputs(model, pixels, mean, std):
    """Logits (or none) and embedding of timm's network, in f64 and in f32."""
    import torch

    def outputs(model, x):
        features = model.forward_features(x)
        embedding = features.mean((2, 3))
        logits = model(x) if model.num_classes > 0 else None
        return logits, embedding

    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(
        std
    ).view(3, 1, 1)
    with torch.inference_mode():
        narrow = outputs(model.eval().float(), x.float())
        wide = outputs(model.double(), x)
    return wide, narrow, x.float().numpy()


def check_network(selfie: Selfie, source: Path, folder: Path, config: Path, what: str) -> None:
    """All exports of `source`, which is a run or a file with `config` beside it."""
    import numpy
    import onnx
    import onnxruntime
    import safetensors.numpy

    print(what)
    folder.mkdir()
    about = json.loads(config.read_text())
    cfg = about["pretrained_cfg"]
    side, classes = cfg["input_size"][1], about["num_classes"]
    images = folder / "images"
    pixels = write_images(images, side)

    # Every way in that is printed loads strictly, and to the same tensors.
    states, models = [], []
    printed = {}
    for to, out in [("timm", "timm"), ("safetensors", "one.safetensors"), ("onnx", "x.onnx")]:
        out = folder / out
        answer = selfie.json("export", source, "--to", to, "-o", out, "--check")
        expect(answer["check"]["distance"] <= 1e-9, f"{to}: --check, {answer['check']['distance']:.1e} in f64")
        printed[to] = answer["loading"]
    ways = {"export --to timm": printed["timm"], "export --to safetensors": printed["safetensors"]}
    for path in [folder / "timm", folder / "one.safetensors"]:
        ways[f"inspect {path.name}"] = selfie.json("inspect", path)["loading"]
    if source.is_dir():
        ways["inspect RUN"] = selfie.json("inspect", source)["loading"]
    for way, lines in ways.items():
        model = run_lines(lines)["model"]
        state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
        states.append(state)
        models.append(model)
    same = all(
        state.keys() == states[0].keys() and all((state[name] == states[0][name]).all() for name in state)
        for state in states
    )
    expect(same, f"timm and PyTorch load strictly, and the same, by the lines of: {', '.join(ways)}")
    raw = safetensors.numpy.load_file(folder / "one.safetensors")
    expect(raw.keys() == states[0].keys(), f"safetensors: {len(raw)} tensors, the names that timm has")

    # Outputs.
    wide, narrow, x = timm_outputs(models[0], pixels, cfg["mean"], cfg["std"])
    names = ["logits", "embedding"]
    own = {name: distance(n, w) for name, n, w in zip(names, narrow, wide) if w is not None}
    # What is written in decimal or rounded once more has this beside it.
    allowed = {name: max(ALLOWED * distance, float(numpy.finfo("f4").eps)) for name, distance in own.items()}
    reference = {name: w.numpy() for name, w in zip(names, wide) if w is not None}

    def compare(whose: str, name: str, found) -> None:
        far = distance(found, reference[name])
        expect(far <= allowed[name], f"{whose}: {name} at {far:.1e} of timm's in f64 (timm's own f32: {own[name]:.1e})")

    if source.is_dir():
        selfie("embed", source, "--data", images, "-o", folder / "x.npy")
        compare("selfie embed", "embedding", numpy.load(folder / "x.npy"))
    if source.is_dir() and classes:
        lines = selfie("predict", source, images, "--top", classes, "--json").stdout.splitlines()
        labels = about["label_names"]
        found = [{p["class"]: p["probability"] for p in json.loads(line)["predictions"]} for line in lines]
        found = numpy.array([[row[label] for label in labels] for row in found])
        logits = reference["logits"] - reference["logits"].max(1, keepdims=True)
        softmax = numpy.exp(logits) / numpy.exp(logits).sum(1, keepdims=True)
        # A change d of the logits changes probabilities by at most d, as softmax does not stretch.
        far = numpy.abs(found - softmax).max()
        most = allowed["logits"] * numpy.linalg.norm(reference["logits"])
        expect(far <= most, f"selfie predict: probabilities within {far:.1e} of timm's in f64")

    # ONNX.
    path = folder / "x.onnx"
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    expect([s.version for s in model.opset_import] == [17], "onnx: the checker passes it, opset 17")
    outputs = [output.name for output in model.graph.output]
    expect(outputs == [name for name in names if name in reference], f"onnx: outputs {outputs}")
    props = {prop.key: prop.value for prop in model.metadata_props}
    told = [json.loads(props[key]) for key in ["input_size", "mean", "std", "crop_pct"]]
    expect(told == [cfg[key] for key in ["input_size", "mean", "std", "crop_pct"]], "onnx: preprocessing in the metadata")
    expect(json.loads(props.get("label_names", "null")) == about.get("label_names"), "onnx: classes in the metadata")
    found = run_lines(printed["onnx"], images=x)
    for name in reference:
        compare("onnxruntime, by the printed lines", name, found[name])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for n in [1, 4]:
        part = session.run(None, {"images": x[:n]})
        far = max(distance(p, reference[name][:n]) for p, name in zip(part, outputs))
        expect(far <= 2 * max(allowed.values()), f"onnxruntime: a batch of {n} is the same")


def check_conversion(selfie: Selfie, folder: Path) -> None:
    """A file of PyTorch's is refused, and the two lines of the refusal convert it."""
    import safetensors.torch
    import timm
    import torch

    print("a .pth of timm's resnetv2_50")
    folder.mkdir()
    model = timm.create_model("resnetv2_50", num_classes=7, layers=[1, 1, 1, 1])
    for name, content in [("plain.pth", model.state_dict()), ("whole.bin", {"epoch": 3, "state_dict": model.state_dict()})]:
        torch.save(content, folder / name)
        out = folder / f"{name}.onnx"
        refused = selfie("export", folder / name, "--to", "onnx", "-o", out, code=3).stderr
        lines = "\n".join(line for line in refused.splitlines() if "torch" in line and not line.startswith("error:"))
        expect(lines.count("\n") == 1, f"{name}: refused, with two lines")
        run_lines(lines)
        converted = safetensors.torch.load_file((folder / name).with_suffix(".safetensors"))
        expect(all((converted[key] == value).all() for key, value in model.state_dict().items()), "the lines convert it")
        selfie("export", (folder / name).with_suffix(".safetensors"), "--to", "onnx", "-o", out, "--check")


def check_vectors(selfie: Selfie, run: Path, data: str, folder: Path) -> None:
    """Embeddings in every format, by the readers of others."""
    import csv

    import numpy
    import pyarrow
    import pyarrow.parquet
    import safetensors

    print("embeddings")
    folder.mkdir()
    for layer in [[], ["--layer", "stage1"]]:
        for name in ["x.npy", "x.csv", "x.parquet", "x.safetensors"]:
            selfie("embed", run, "--data", data, "-o", folder / name, "--overwrite", *layer)
        expected = numpy.load(folder / "x.npy")
        table = pyarrow.parquet.read_table(folder / "x.parquet")
        fields = [(field.name, str(field.type), field.nullable) for field in table.schema]
        floats = str(pyarrow.list_(pyarrow.field("element", pyarrow.float32(), nullable=False)))
        wanted = [("name", "string", False), ("label", "int64", True), ("class", "string", True), ("embedding", floats, False)]
        expect(fields == wanted, f"pyarrow: columns {', '.join(field for field, _, _ in fields)}")
        values = numpy.array(table["embedding"].to_pylist(), "f4")
        expect(values.shape == expected.shape and (values == expected).all(), f"pyarrow: {values.shape} numbers, bit for bit")
        with open(folder / "x.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        same = [(row["name"], row["label"], row["class"]) for row in rows]
        parquet = [(r["name"], str(r["label"]), r["class"]) for r in table.to_pylist()]
        expect(same == parquet, "pyarrow: names, labels and classes of the CSV")
        with safetensors.safe_open(folder / "x.safetensors", "numpy") as file:
            expect((file.get_tensor("embedding") == expected).all(), "safetensors: the same numbers")
            expect(json.loads(file.metadata()["names"]) == [row["name"] for row in rows], "safetensors: the same names")
        about = json.loads(table.schema.metadata[b"about"])
        expect(about["layer"].endswith("average over the image"), f"pyarrow: {about['layer']}")
    unlabelled = folder / "unlabelled"
    write_images(unlabelled, 28)
    selfie("embed", run, "--data", unlabelled, "-o", folder / "u.parquet")
    table = pyarrow.parquet.read_table(folder / "u.parquet")
    expect(table["label"].null_count == IMAGES and table["class"].null_count == IMAGES, "pyarrow: no labels, no classes")


def random_timm(folder: Path, classes: int) -> None:
    """timm's full resnetv2_50, with a norm's scale, shift and statistics of its own for each channel."""
    command = [sys.executable, HERE / "check_timm.py", "make", folder, "--classes", str(classes)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--selfie", type=Path, required=True, help="the binary")
    parser.add_argument("--venv", type=Path, default=HERE.parents[1] / "target" / "exports-venv")
    args = parser.parse_args()
    if Path(sys.prefix).resolve() != args.venv.resolve():
        bootstrap(args.venv)
    selfie = Selfie(args.selfie.resolve())
    # As all comparisons are of f32 on the CPU.
    os.environ |= {"SELFIE_RUN_DEVICE": "cpu", "SELFIE_RUN_PRECISION": "f32"}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = "synthetic:train=120,test=20,classes=5"
        common = ["--data", data, "--preset", "tiny", "--batch", "16"]
        small = ["--image-size", "28", "--steps", "30"]
        selfie("pretrain", *common, *small, "--set", "model.patch_size=7", "--out", root / "pre")
        selfie("finetune", *common, *small, "--lr", "0.05", "--init", root / "pre", "--out", root / "fine")
        large = ["--image-size", "112", "--steps", "20", "--lr", "0.05"]
        selfie("finetune", *common, *large, "--init", "scratch", "--out", root / "large")
        for run, what in [
            ("fine", "a classifier with the small stem"),
            ("large", "a classifier with the large stem"),
            ("pre", "a pretraining run"),
        ]:
            check_network(selfie, root / run, root / f"of-{run}", root / run / "weights/config.json", what)
        random_timm(root / "timm", 10)
        check_network(selfie, root / "timm/model.safetensors", root / "of-timm", root / "timm/config.json", "timm's resnetv2_50")
        check_conversion(selfie, root / "of-pth")
        check_vectors(selfie, root / "fine", data, root / "of-vectors")
    print(f"{passed} checks passed")


if __name__ == "__main__":
    main()
