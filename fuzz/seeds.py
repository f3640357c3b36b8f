"""Writes the seeds in corpus/: small valid files of every kind, from which the fuzzer sets out. Needs Pillow and numpy.

python fuzz/seeds.py
"""

import gzip
import io
import json
import pickle
import struct
import tarfile
from pathlib import Path

from PIL import Image

CORPUS = Path(__file__).parent / "corpus"


def seed(target, name, content):
    path = CORPUS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def tar(members, format=tarfile.USTAR_FORMAT):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            elif isinstance(content, tuple):
                info.type, info.linkname = tarfile.LNKTYPE, content[0]
            else:
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content if isinstance(content, bytes) else b""))
    # Blocks of zeros end an archive: one is enough, and tarfile writes up to twenty.
    whole = out.getvalue()
    used = whole.rstrip(b"\0")
    return whole[: len(used) + -len(used) % 512 + 512]


def records(count):
    return b"".join(bytes([9, label % 3]) + bytes([label]) * 3072 for label in range(count))


def cifar():
    names = ("batches.meta.txt", b"cat\ndog\nship\n")
    train = [("d/data_batch_1.bin", records(4)), ("d/data_batch_2.bin", records(4))]
    for name, members in [
        ("whole", [names, *train, ("d/test_batch.bin", records(2))]),
        ("test", [("test_batch.bin", records(2))]),
        ("names", [names]),
        ("python", [("data_batch_1", b"x")]),
        ("other", [("readme.md", b"x"), ("link", "readme.md")]),
    ]:
        seed("cifar_tar", name, tar(members))
        seed("cifar_gzip", name, gzip.compress(tar(members), mtime=0))
    whole = tar([names, *train])
    pieces = [gzip.compress(whole[at : at + 9000], mtime=0) for at in range(0, len(whole), 9000)]
    seed("cifar_gzip", "members", b"".join(pieces) + bytes(20))


def tars():
    pixel = b"P6 1 1 255\n\0\0\0"
    flat = [("a/1.jpg", pixel), ("a/2.png", pixel), ("b/3.ppm", pixel)]
    long = "a/" + "x" * 120 + ".jpg"
    for name, content in [
        ("classes", tar(flat)),
        ("parts", tar([("train/" + name, content) for name, content in flat] + [("val/a/1.jpg", pixel), ("val/b/", None)])),
        ("long", tar([(long, pixel)], tarfile.GNU_FORMAT)),
        ("pax", tar([(long, pixel), ("a/\u00e9.jpg", pixel)], tarfile.PAX_FORMAT)),
        ("inside", tar([("p/a/1.jpg", pixel), ("p/a/2.jpg", ("p/a/1.jpg",)), ("p/a/3.jpg", "1.jpg"), ("p/b", "a"), ("p/a/up", "..")])),
        ("twice", tar([("a/1.jpg", pixel), ("a/1.jpg", b"x"), ("a", pixel), ("a/1.jpg", None)])),
        ("other_parts", tar([("d/Train_set/a/1.jpg", pixel), ("d/seg_test/seg_test/a/1.jpg", pixel), ("__MACOSX/1.jpg", pixel)])),
        ("links", tar([("a/1.jpg", "../../etc/passwd"), ("../2.jpg", pixel), ("/3.jpg", pixel), (".hidden/4.jpg", pixel)])),
    ]:
        seed("tar_folder", name, content)


def shards():
    pixel = b"P6 1 1 255\n\0\0\0"
    sample = lambda key, label: [(f"{key}.ppm", pixel), (f"{key}.cls", label)]
    seed("webdataset", "two", tar([*sample("000", b"0"), *sample("a/001", b"1\n")]))
    seed("webdataset", "links", tar([*sample("000", b"0"), ("1.ppm", ("000.ppm",)), ("1.cls", "000.cls"), ("2.ppm", "lost")]))
    seed("webdataset", "more", tar([("x.json", b"{}"), *sample("x", b"12"), ("x.y.png", pixel), ("z.jpg", pixel)]))


def batches():
    import numpy

    numbers = numpy.arange(24, dtype=numpy.uint8).reshape(2, 12)
    for protocol in (0, 2, 4, 5):
        batch = {"data": numbers, "labels": [1, 10], "filenames": ["a", "b"], "mean": numpy.float64(0.5)}
        seed("pickle", f"protocol-{protocol}", pickle.dumps(batch, protocol))
        seed("pickle", f"bytes-{protocol}", pickle.dumps({b"data": numbers, b"labels": numpy.array([1, 2])}, protocol))
    for name, save in [("stored", numpy.savez), ("deflated", numpy.savez_compressed)]:
        out = io.BytesIO()
        save(out, data=numpy.zeros((2, 192), numpy.uint8), labels=numpy.array([1, 1000]))
        seed("npz", name, out.getvalue())


def images():
    picture = Image.new("RGB", (9, 7))
    picture.putdata([(x * 20, y * 30, x * y) for y in range(7) for x in range(9)])
    exif = Image.Exif()
    exif[0x0112] = 6
    saves = [
        ("jpeg", picture, {"format": "JPEG", "exif": exif}),
        ("jpeg-progressive", picture, {"format": "JPEG", "progressive": True, "optimize": True}),
        ("jpeg-cmyk", picture.convert("CMYK"), {"format": "JPEG"}),
        ("jpeg-grey", picture.convert("L"), {"format": "JPEG"}),
        ("png", picture, {"format": "PNG"}),
        ("png-palette", picture.convert("P"), {"format": "PNG"}),
        ("png-16", picture.convert("I;16"), {"format": "PNG"}),
        ("png-alpha", picture.convert("RGBA"), {"format": "PNG"}),
        ("bmp", picture, {"format": "BMP"}),
        ("bmp-palette", picture.convert("P"), {"format": "BMP"}),
        ("ppm", picture, {"format": "PPM"}),
        ("pgm", picture.convert("L"), {"format": "PPM"}),
        ("tiff", picture, {"format": "TIFF"}),
        ("tiff-lzw", picture, {"format": "TIFF", "compression": "tiff_lzw"}),
        ("tiff-deflate", picture, {"format": "TIFF", "compression": "tiff_adobe_deflate"}),
        ("tiff-packbits", picture.convert("L"), {"format": "TIFF", "compression": "packbits"}),
        ("webp", picture, {"format": "WEBP", "quality": 50}),
        ("webp-lossless", picture, {"format": "WEBP", "lossless": True}),
        ("webp-alpha", picture.convert("RGBA"), {"format": "WEBP"}),
    ]
    for name, image, options in saves:
        out = io.BytesIO()
        image.save(out, **options)
        seed("image", name, out.getvalue())
    # Layouts that Pillow does not write, and files that are no images.
    layouts = CORPUS.resolve().parents[1] / "selfie-data" / "tests" / "fixtures" / "jpeg"
    for name in ["420_apart", "420_refined", "420_no_tables", "444_restart"]:
        seed("image", f"jpeg-{name}", (layouts / f"{name}.jpg").read_bytes())
    tiff = b"MM\0*" + struct.pack(">IHHHII", 8, 1, 0x0112, 4, 1, 6) + bytes(4)
    seed("image", "jpeg-orientation", (layouts / "grey.jpg").read_bytes().replace(
        b"\xff\xe0", b"\xff\xe1" + struct.pack(">H", len(tiff) + 8) + b"Exif\0\0" + tiff + b"\xff\xe0", 1))
    seed("image", "foreign-heic", struct.pack(">I", 24) + b"ftypmif1\0\0\0\0heicmiaf")
    seed("image", "foreign-html", b"<?xml version='1.0'?><!-- x --><!DOCTYPE html><p>404")
    seed("image", "foreign-torch", b"PK\3\4" + bytes(22) + struct.pack("<HH", 16, 0) + b"archive/data.pkl")


def safetensors(tensors, metadata={"format": "pt"}):
    header, at = {"__metadata__": metadata}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


def weights():
    conv = ("F32", [2, 3, 1, 2], struct.pack("<12f", *range(12)))
    norm = ("F32", [2], struct.pack("<2f", 1, 2))
    for name, tensors in [
        ("whole", {"stem.conv.weight": conv, "norm.weight": norm}),
        ("types", {"a": ("F16", [2], bytes(4)), "b": ("BF16", [2], bytes(4)), "c": ("F64", [1], bytes(8))}),
        ("counter", {"norm.num_batches_tracked": ("I64", [], bytes(8)), "norm.weight": norm}),
        ("stages", {f"stages.{i}.blocks.0.norm1.weight": ("F32", [0], b"") for i in (0, 1, 3)}),
    ]:
        seed("safetensors", name, safetensors(tensors))
    model = {"image_size": 8, "patch_size": 4, "stem_width": 2, "heads": 1, "ffn": 4, "depths": [1, 1, 1, 1]}
    for name, classes, targets, parts in [("puzzle", None, 4, 1), ("labels", 3, 1, 2)]:
        about = {"step": 7, "seed": 1, "loss": "NaN", "first_samples": [0, 1][:parts], "keys": ["a", "b"]}
        about |= {"model": model, "classes": classes}
        batch = {
            "batch.images": ("U8", [2, 8, 8, 3], bytes(384)),
            "batch.draws": ("I32", [2, 3], struct.pack("<6i", 0, 0, 1, -2, 2, 0)),
            "batch.targets": ("U32", [2, targets], struct.pack(f"<{2 * targets}I", *range(targets), *range(targets))),
            "batch.indices": ("U64", [2], bytes(16)),
            "norm.weight": norm,
        }
        metadata = {"selfie": "selfie step 1", "about": json.dumps(about)}
        seed("step_file", name, safetensors(batch, metadata))


def texts():
    files = [{"name": f"{name}", "bytes": 10, "crc32": 7} for name in ("state.json", "weights.safetensors", "velocity.safetensors")]
    seed("checkpoint", "manifest", json.dumps({"format": "selfie checkpoint 1", "files": files}))
    progress = {"step": 120, "seconds": 1.5, "skipped": 2, "skipped_in_a_row": 1, "seed": 5}
    seed("checkpoint", "state", json.dumps({"progress": progress, "config": {"train": {"lr": 0.1}, "model": {"depths": [1, 2]}}}))
    seed("config_toml", "few", "[data]\npath = \"synthetic:\"\n\n[train]\nlr = 0.05\nsteps = 10\n")
    seed("config_toml", "network", (
        "[model]\npreset = \"tiny\"\nstem = \"large\"\nstem_width = 8\ndepths = [1, 2, 1, 1]\npatch_size = 4\nheads = 4\nffn = 80\n"
        "pool_blocks = 2\npositions = \"rowcol\"\nencoder_positions = false\nlogit_scale = \"1/sqrt(d)\"\nhidden_fraction = 0.5\n"
        "dropout = 0.2\n[data]\nimage_size = 32\nmean = [0.1, 0.2, 0.3]\nstd = [1.0, 1.0, 1.0]\n"
    ))
    seed("config_toml", "training", (
        "[train]\nepochs = 2.5\nbatch = 64\naccumulate = 2\nwarmup = 0\nmomentum = 0.0\nweight_decay = 1e-4\naugment = true\nseed = 1\n"
        "log_every = 1\neval_every = 0\neval_images = 9\nsave_every = 0\nkeep = 1\n[run]\nout = \"r\"\ndevice = \"cpu\"\nprecision = \"bf16\"\n"
    ))
    seed("config_toml", "minutes", "train.minutes = 1\nrun.threads = 2\ndata = { limit = 5, workers = 0, max_bad = 1.0, holdout = 0 }\n")
    card = {"label_names": ["cat", "dog"], "num_classes": 2, "pretrained_cfg": {"input_size": [3, 224, 224]}}
    seed("weights_config", "classifier", json.dumps(card))
    seed("weights_config", "pretrained", json.dumps({"num_classes": 0, "pretrained_cfg": {"input_size": [3, 32, 32]}}))
    part = {"description": "d", "images": 7, "used": 7}
    data = {"train": part, "held_out": part, "test": None, "classes": ["a"], "image_size": 32}
    seed("data_json", "run", json.dumps(data))
    line = {"step": 10, "epoch": 0.5, "loss": 1.25, "accuracy": 0.5, "x_chance": 2.0, "learning_rate": 0.1, "grad_norm": 1.0,
            "images_per_second": 9.5, "data_wait": 0.1, "memory_bytes": 4096, "seconds": 1.5}
    evaluation = {"step": 20, "epoch": 1.0, "seconds": 3.0, "eval_loss": 1.0, "eval_accuracy": 0.75}
    seed("metrics", "run", json.dumps(line) + "\n" + json.dumps(evaluation) + "\n")
    seed("metrics", "torn", json.dumps(evaluation) + "\n" + json.dumps(line)[:40])
    status = {"command": "pretrain", "state": "finished", "step": 5, "steps": 5, "result": {"chance": 0.25}, "process": 7, "updated_unix": 1}
    seed("status", "finished", json.dumps(status))
    seed("status", "running", json.dumps(status | {"state": "running", "steps": None, "result": None}))
    for name, text in [("percent", "5%@3"), ("count", "2@7"), ("all", "all"), ("list", "folder/0.png\tclass 0\n3.png\n\n8.png"),
                       ("spelled", " folder/0.png \nFolder/1.PNG\n\\xF6\\x5CxF6")]:
        seed("labels", name, text)
    seed("val_labels", "names", "1.jpg cat\nval/2.jpg\tdog\n")
    seed("val_labels", "numbers", "1.jpg 0\n2.jpg 1\n")
    seed("val_labels", "kaggle", "ImageId,PredictionString\n1,cat 1 2 3 4\n2,dog 5 6 7 8\n")
    seed("val_labels", "tensorflow", "cat\ndog\n")
    seed("synthetic", "all", "train=30,test=20,size=16,classes=3,seed=9")
    seed("synthetic", "defaults", "")


for make in (cifar, tars, shards, batches, images, weights, texts):
    make()
