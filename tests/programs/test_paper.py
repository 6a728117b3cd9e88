"""The paper's experiments: readers, data, models, published values, runs, tables."""

import gzip
import io
import json
import os
import pathlib
import pickle
import re
import signal
import struct
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io
import tyro
from conftest import CACHED, QUICK
from flax import nnx
from PIL import Image

import spherical_optax as so
from examples.paper import __main__ as program
from examples.paper import (
    cells,
    data,
    models,
    optimizers,
    options,
    published,
    readers,
    results,
    sweep,
    training,
)
from examples.paper.errors import DataError

ROOT = pathlib.Path(__file__).parents[2]
RNG = np.random.default_rng(0)


def pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


# Files of the real formats.


def write_idx(path, array, name, *, compress=False):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.tobytes()
    (path / f"{name}.gz").write_bytes(gzip.compress(content)) if compress else (
        path / name
    ).write_bytes(content)


def write_mnist(path, train=40, test=20, *, compress=False, labels=None, side=28):
    """Writes images from which the label can be learned; returns images and labels."""
    path.mkdir(exist_ok=True)
    written = []
    for name, n in (("train", train), ("t10k", test)):
        y = np.arange(n, dtype=np.uint8) % 10 if labels is None else np.array(labels, np.uint8)
        x = pixels(n, side, side) // 4
        x[np.arange(n), y * (side // 10)] = 255
        write_idx(path, x, f"{name}-images-idx3-ubyte", compress=compress)
        write_idx(path, y, f"{name}-labels-idx1-ubyte", compress=compress)
        written.append((x, y))
    return written


def python2_pickle(content):
    """Pickles content as Python 2 and its NumPy wrote CIFAR: protocol 2, with byte strings."""

    def string(value):
        return b"T" + struct.pack("<i", len(value)) + value

    def dump(value):
        if isinstance(value, bytes):
            return string(value)
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"](" + b"".join(map(dump, value)) + b"e"
        if isinstance(value, dict):
            return b"}(" + b"".join(dump(k) + dump(v) for k, v in value.items()) + b"u"
        kind = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R(K\x03" + string(b"|")
        kind += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        shape = b"(" + b"".join(map(dump, value.shape)) + b"t"
        made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b")
        return made + b"\x87R(K\x01" + shape + kind + b"\x89" + string(value.tobytes()) + b"tb"

    return b"\x80\x02" + dump(content) + b"."


def python3_pickle(content):
    return pickle.dumps(content, protocol=2)


def cifar_names(classes):
    if classes == 10:
        return [f"data_batch_{i}" for i in range(1, 6)], "test_batch"
    return ["train"], "test"


def cifar_rows(images):
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), 3072)


def write_cifar_python(path, classes, dump):
    train, test = cifar_names(classes)
    written = {}
    for name in (*train, test):
        images, labels = pixels(3, 32, 32, 3), RNG.integers(0, classes, 3).tolist()
        content = {b"batch_label": b"some", b"data": cifar_rows(images), b"filenames": [b"a", b"b"]}
        content |= {b"labels": labels} if classes == 10 else {b"fine_labels": labels}
        (path / name).write_bytes(dump(content))
        written[name] = images, labels
    return written, train, test


def write_cifar_binary(path, classes, n=3):
    train, test = cifar_names(classes)
    written = {}
    for name in (*train, test):
        images, labels = pixels(n, 32, 32, 3), RNG.integers(0, classes, n)
        coarse = [] if classes == 10 else [np.full((n, 1), 7)]
        rows = np.hstack([*coarse, labels[:, None], cifar_rows(images)]).astype(np.uint8)
        (path / f"{name}.bin").write_bytes(rows.tobytes())
        written[name] = images, labels.tolist()
    return written, train, test


def read_each(images):
    return zip(*(images[i] for i in range(len(images))), strict=True)


def as_arrays(images):
    found, labels = read_each(images)
    return np.stack(found), list(labels)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("form", [python2_pickle, python3_pickle, None])
def test_cifar(classes, form, tmp_path):
    written, train, test = (
        write_cifar_binary(tmp_path, classes)
        if form is None
        else write_cifar_python(tmp_path, classes, form)
    )
    dataset = readers.read(tmp_path)
    assert dataset.kind == f"cifar{classes}"
    assert dataset.classes == classes
    assert dataset.shape == (32, 32, 3)
    images, labels = as_arrays(dataset.train)
    np.testing.assert_array_equal(images, np.concatenate([written[name][0] for name in train]))
    assert labels == [label for name in train for label in written[name][1]]
    images, labels = as_arrays(dataset.test)
    np.testing.assert_array_equal(images, written[test][0])
    assert labels == written[test][1]
    assert images.dtype == np.uint8


def test_svhn(tmp_path):
    images, labels = pixels(2, 32, 32, 3), np.array([[10], [3]], np.uint8)
    for name in ("train", "test"):
        content = {"X": images.transpose(1, 2, 3, 0), "y": labels}
        scipy.io.savemat(tmp_path / f"{name}_32x32.mat", content, do_compression=True)
    dataset = readers.read(tmp_path)
    found, classes = as_arrays(dataset.train)
    np.testing.assert_array_equal(found, images)
    assert classes == [0, 3]
    assert (dataset.kind, dataset.classes, dataset.shape) == ("svhn", 10, (32, 32, 3))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    ("kind", "labels"), [*readers.FIRST_LABELS.items(), ("other", list(range(10)))]
)
def test_mnist(kind, labels, compress, tmp_path):
    (train, _), (test, _) = write_mnist(tmp_path, 10, 10, compress=compress, labels=labels)
    dataset = readers.read(tmp_path)
    assert (dataset.kind, dataset.classes, dataset.shape) == (kind, 10, (28, 28, 1))
    for found, written in ((dataset.train, train), (dataset.test, test)):
        images, classes = as_arrays(found)
        np.testing.assert_array_equal(images, written[..., None])
        assert classes == labels


def write_folders(path, test="val", names=("cat", "dog")):
    for part in ("train", test):
        for label, name in enumerate(names):
            (path / part / name).mkdir(parents=True)
            for i in range(2):
                image = np.full((20 + 10 * i, 40, 3), 50 * label + i, np.uint8)
                Image.fromarray(image).save(path / part / name / f"{i}.png")
    Image.fromarray(pixels(30, 30)).save(path / "train" / "dog" / "2.JPEG")  # grey
    (path / "train" / "dog" / "notes.txt").write_text("no image")


@pytest.mark.parametrize("test", ["val", "test"])
def test_class_folders(test, tmp_path):
    write_folders(tmp_path, test)
    dataset = readers.read(tmp_path)
    assert (dataset.kind, dataset.classes, dataset.shape) == ("other", 2, None)
    assert (len(dataset.train), len(dataset.test)) == (5, 4)
    image, label = dataset.train[3]
    assert (image.shape, label) == ((30, 40, 3), 1)
    assert np.all(image == 51)
    assert dataset.train[4][0].shape == (30, 30, 3)


def message(number, content):
    """A field of a protocol buffer that contains bytes."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def example(image, label, *, packed=True):
    """A tf.train.Example, encoded by hand."""
    number = varint(label % 2**64)
    integers = message(1, number) if packed else varint(1 << 3) + number
    values = {
        b"file_name": message(1, message(1, b"x.png")),
        b"image": message(1, message(1, image)),
        b"label": message(3, integers),
        b"scale": message(2, message(1, struct.pack("<f", 1.5))),
    }
    entries = [message(1, message(1, k) + message(2, v)) for k, v in values.items()]
    return message(1, b"".join(entries))


def write_records(path, label=1, make=example):
    module = pytest.importorskip("array_record.python.array_record_module")

    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 30, 3), 9, np.uint8)).save(buffer, "PNG")
    for name in ("train", "validation"):
        for shard in range(2):
            file = path / f"pets-{name}.array_record-0000{shard}-of-00002"
            writer = module.ArrayRecordWriter(str(file), "group_size:1")
            for i in range(3):
                writer.write(make(buffer.getvalue(), label if i == 2 else 0))
            writer.close()
    (path / "label.labels.txt").write_text("cat\ndog\n")


@pytest.mark.parametrize("packed", [False, True])
def test_array_record(packed, tmp_path):
    write_records(tmp_path, make=lambda *content: example(*content, packed=packed))
    dataset = readers.read(tmp_path)
    assert (dataset.kind, dataset.classes, dataset.shape) == ("other", 2, None)
    assert [len(dataset.train), len(dataset.test)] == [6, 6]
    images, labels = as_arrays(dataset.train)
    assert images.shape == (6, 20, 30, 3)
    assert np.all(images == 9)
    assert labels == [0, 0, 1, 0, 0, 1]


# Invalid files.


def wrong(path, *texts):
    """Reading a data set raises an error in one line that contains the texts."""

    def read_all():
        dataset = readers.read(path)
        for images in (dataset.train, dataset.test):
            read_each(images)

    with pytest.raises(DataError, match=r"expected .*, found ") as error:
        read_all()
    for text in (str(path), *texts):
        assert text in str(error.value)
    assert "\n" not in str(error.value)


class Hostile:
    """An object that runs a command when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_a_hostile_pickle_is_not_executed(tmp_path):
    write_cifar_python(tmp_path, 10, python3_pickle)
    file = tmp_path / "executed"
    hostile = pickle.dumps({b"data": Hostile(file), b"labels": []}, protocol=2)
    (tmp_path / "data_batch_1").write_bytes(hostile)
    wrong(tmp_path, "data_batch_1", "the name posix.system")
    assert not file.exists()
    pickle.loads(hostile)
    assert file.exists()  # it is hostile indeed


REFUSED = {
    "eval": b"cbuiltins\neval\nU\x011\x85R.",
    "a class of NumPy": b"cnumpy\nmemmap\nU\x01a\x85R.",
    "an attribute below an admitted name": b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.",
    "an attribute set on an admitted name": b"cnumpy\ndtype\nN}X\x05\0\0\0_callK\x01s\x86b.",
    "an array of objects": b"cnumpy\ndtype\nU\x01O\x85R.",
    "an extension": b"\x82\x01.",
    "a persistent reference": b"U\x01aQ.",
    "nothing": b"",
}


@pytest.mark.parametrize("content", REFUSED.values(), ids=REFUSED)
def test_other_pickles_are_refused(content, tmp_path):
    write_cifar_python(tmp_path, 10, python3_pickle)
    (tmp_path / "data_batch_3").write_bytes(content)
    wrong(tmp_path, "data_batch_3: expected a pickle of byte arrays")


def change_pickle(path, **changed):
    content = pickle.loads((path / "data_batch_2").read_bytes())
    content |= {name.encode(): value for name, value in changed.items()}
    (path / "data_batch_2").write_bytes(python3_pickle(content))


def cut(path, by=1):
    path.write_bytes(path.read_bytes()[:-by])


def test_damaged_cifar(tmp_path):
    def fresh(change, *texts):
        write_cifar_python(tmp_path, 10, python3_pickle)
        change()
        wrong(tmp_path, *texts)

    fresh(lambda: (tmp_path / "data_batch_4").unlink(), "data_batch_4: expected a file", "nothing")
    fresh(lambda: cut(tmp_path / "test_batch", 20), "test_batch: expected a pickle")
    fresh(lambda: change_pickle(tmp_path, labels=[0, 1]), "expected 3 labels", "found 2")
    fresh(lambda: change_pickle(tmp_path, labels=[0, 1, 10]), "labels from 0 to 9, found 10")
    fresh(lambda: change_pickle(tmp_path, labels=[0, 1, -1]), "data_batch_2", "labels of at least")
    fresh(lambda: change_pickle(tmp_path, data=pixels(3, 3071)), "(images, 3072)", "(3, 3071)")
    fresh(lambda: change_pickle(tmp_path, data=[b"a"]), "data of dtype uint8, found list")
    fresh(
        lambda: change_pickle(tmp_path, data=np.zeros((3, 3072))), "a pickle of byte arrays", "f8"
    )


def test_damaged_binary_cifar(tmp_path):
    write_cifar_binary(tmp_path, 100)
    cut(tmp_path / "train.bin")
    wrong(tmp_path, "train.bin: expected a multiple of 3074 bytes, found 9221")
    (tmp_path / "train.bin").write_bytes(b"")
    wrong(tmp_path, "train.bin", "found 0")
    (tmp_path / "train.bin").write_bytes(bytes([0, 100]) + bytes(3072))
    wrong(tmp_path, "labels from 0 to 99, found 100")


def test_damaged_svhn(tmp_path):
    def fresh(content, *texts):
        good = {"X": pixels(32, 32, 3, 2), "y": np.array([[1], [2]], np.uint8)}
        scipy.io.savemat(tmp_path / "train_32x32.mat", good)
        scipy.io.savemat(tmp_path / "test_32x32.mat", {**good, **content})
        wrong(tmp_path, "test_32x32.mat", *texts)

    fresh({"y": np.array([[1], [11]], np.uint8)}, "labels from 1 to 10, found 11")
    fresh({"X": pixels(32, 32, 3, 2).astype(float)}, "X of dtype uint8, found float64")
    fresh({"X": pixels(32, 30, 3, 2)}, "(32, 32, 3, images), found (32, 30, 3, 2)")
    fresh({"y": np.array([[1], [2], [3]], np.uint8)}, "expected 2 labels", "found 3")
    scipy.io.savemat(tmp_path / "test_32x32.mat", {"other": np.ones(2)})
    wrong(tmp_path, "the variables X and y, found ['other']")
    cut(tmp_path / "train_32x32.mat", 100)
    wrong(tmp_path, "train_32x32.mat: expected a whole MATLAB file")
    (tmp_path / "train_32x32.mat").unlink()
    wrong(tmp_path, "train_32x32.mat: expected a file, found nothing")


def test_damaged_idx(tmp_path):
    images, labels = (tmp_path / f"train-{name}-ubyte" for name in ("images-idx3", "labels-idx1"))
    write_mnist(tmp_path, 20)
    cut(images)
    wrong(tmp_path, f"{images}: expected {16 + 20 * 784} bytes for shape (20, 28, 28)")
    images.write_bytes(b"\0\0\x0d\3" + bytes(20))
    wrong(tmp_path, "expected an IDX file of bytes with 3 axes, 00000803, found 00000d03")
    images.write_bytes(b"\0\0\x08\3\0")
    wrong(tmp_path, f"{images}: ")
    write_mnist(tmp_path, 10, labels=[10] * 10, test=10)
    wrong(tmp_path, "labels from 0 to 9, found 10")
    write_mnist(tmp_path, 20)
    write_idx(tmp_path, np.zeros(19, np.uint8), labels.name)
    wrong(tmp_path, "expected 20 labels, one for each image, found 19")
    labels.unlink()
    wrong(tmp_path, f"{labels}: expected a file, found nothing")
    for each in tmp_path.iterdir():
        each.unlink()
    write_mnist(tmp_path, compress=True)
    cut(tmp_path / "t10k-images-idx3-ubyte.gz", 20)
    wrong(tmp_path, "t10k-images-idx3-ubyte.gz: expected a whole gzip file")


def test_damaged_folders(tmp_path):
    wrong(tmp_path, "expected CIFAR", "found nothing")
    wrong(tmp_path / "none", "expected a folder, found nothing")
    (tmp_path / "train").mkdir()
    wrong(tmp_path, "a folder val or test beside train, found none")
    write_folders(tmp_path)
    (tmp_path / "val" / "cow").mkdir()
    wrong(tmp_path, "val: expected the class folders of train, found others: cow")
    (tmp_path / "train" / "cow").mkdir()
    wrong(tmp_path, "train/cow: expected at least one image", "found none")
    for part in ("train", "val"):
        Image.fromarray(pixels(9, 9)).save(tmp_path / part / "cow" / "a.png")
    cut(tmp_path / "val" / "cow" / "a.png", 40)
    wrong(tmp_path, "val/cow/a.png: expected an image")


def test_damaged_records(tmp_path, monkeypatch):
    write_records(tmp_path, label=2)
    wrong(tmp_path, "record 2: expected a label from 0 to 1, found 2")
    write_records(tmp_path, label=-1)
    wrong(tmp_path, "record 2: expected a label from 0 to 1, found -1")
    write_records(tmp_path, make=lambda image, label: b"\x0a\xff")
    wrong(tmp_path, "record 0: expected a tf.train.Example")
    write_records(tmp_path, make=lambda image, label: message(1, b""))
    wrong(tmp_path, "expected one image and one label, found features []")
    (tmp_path / "label.labels.txt").unlink()
    wrong(tmp_path, "label.labels.txt: expected a file with a line for each class")
    write_records(tmp_path)
    file = tmp_path / "pets-train.array_record-00001-of-00002"
    file.write_bytes(b"")
    wrong(tmp_path, f"{file}: expected an ArrayRecord file, found an empty one")
    monkeypatch.setitem(sys.modules, "array_record.python.array_record_data_source", None)
    wrong(tmp_path, "expected the package array_record to read it, found none installed")


# Data.


def make_dataset(n=100, side=8, kind="cifar10"):
    images = np.arange(n, dtype=np.uint8)[:, None, None, None] * np.ones((side, side, 3), np.uint8)
    source = readers.ArrayImages(images, np.arange(n) % 10)
    return readers.Dataset(kind, source, source, 10, (side, side, 3))


@pytest.mark.parametrize("seed", [0, 1])
def test_split_does_not_overlap(seed):
    parts = data.split(make_dataset(), seed, 0.05, None, None)
    train, validation = (set(part.indices.tolist()) for part in parts[:2])
    assert len(validation) == 5
    assert not train & validation
    assert train | validation == set(range(100))
    fewer = data.split(make_dataset(), seed, 0.05, 30, 20)
    assert [len(part) for part in fewer] == [30, 5, 20]
    assert set(fewer.validation.indices) == validation  # does not depend on train_images
    same = data.split(make_dataset(), seed, 0.0, None, None)
    assert same.validation is same.test
    other = data.split(make_dataset(), seed + 1, 0.05, None, None)
    assert set(other.validation.indices) != validation


def batches(hosts=1, host=0, threads=2, how="crop_flip", seed=0):
    source = data.split(make_dataset(), 0, 0.05, None, None).train
    to = data.Loading(8, host, hosts, threads)
    return data.training_batches(source, 20, 2, seed, how, to)


def test_batches_cover_each_epoch_once():
    seen = [batch["image"][:, 0, 0, 0].tolist() for batch in batches(how="none")]
    assert [len(batch) for batch in seen] == [20] * 8  # 95 images: four whole batches an epoch
    epochs = [np.concatenate(part).tolist() for part in (seen[:4], seen[4:])]
    for epoch in epochs:
        assert len(set(epoch)) == 80
    assert epochs[0] != epochs[1]
    assert seen != [batch["image"][:, 0, 0, 0].tolist() for batch in batches(how="none", seed=1)]


def equal(one, other):
    for name in ("image", "label", "weight"):
        np.testing.assert_array_equal(one[name], other[name])


def test_batches_do_not_depend_on_hosts_threads_or_restarts():
    whole = list(batches())
    for i, batch in enumerate(batches(threads=0)):
        equal(batch, whole[i])
    parts = [list(batches(hosts=2, host=host)) for host in range(2)]
    for i, batch in enumerate(whole):
        for host in range(2):
            equal(parts[host][i], {name: values[host::2] for name, values in batch.items()})
    started = batches()
    for _ in range(5):
        next(started)
    resumed = batches(threads=0)
    resumed.set_state(json.loads(json.dumps(started.get_state())))
    for expected in whole[5:]:
        equal(next(resumed), expected)


def test_evaluation_covers_all_images_once():
    source = data.Source(make_dataset().test, np.arange(45))
    found = list(data.evaluation_batches(source, 20, 0, "none", data.Loading(8)))
    assert [len(batch["label"]) for batch in found] == [20, 20, 20]
    images, weights = (
        np.concatenate([batch[name] for batch in found]) for name in ("image", "weight")
    )
    np.testing.assert_array_equal(images[weights == 1][:, 0, 0, 0], np.arange(45))
    assert weights.sum() == 45


def test_crop_and_flip():
    image = np.arange(1, 17, dtype=np.uint8).reshape(1, 4, 4, 1)
    middle, corner = np.array([[0.5, 0.5]]), np.array([[0.0, 0.999]])
    np.testing.assert_array_equal(data.crop(image, middle), image)
    moved = data.crop(image, corner)[0, ..., 0]
    assert np.all(moved == 0)  # by the whole padding, which is black
    one_down = data.crop(image, np.array([[5 / 9, 0.5]]))[0, ..., 0]
    np.testing.assert_array_equal(one_down[:3], image[0, 1:, :, 0])
    np.testing.assert_array_equal(data.flip(image, np.array([0.4]))[0], image[0, :, ::-1])
    np.testing.assert_array_equal(data.flip(image, np.array([0.6])), image)


def test_resized_crop_and_centre():
    image = np.zeros((70, 140, 3), np.uint8)
    image[:, 70:] = 200
    left, right = data.centre_crop(image, 32)[:, :15], data.centre_crop(image, 32)[:, 17:]
    assert left.max() == 0
    assert right.min() == 200
    shares = []
    for seed in range(200):
        found = data.resized_crop(image, 16, np.random.default_rng(seed))
        assert found.shape == (16, 16, 3)
        shares.append(found.mean() / 200)
    assert 0.4 < np.mean(shares) < 0.6
    assert np.std(shares) > 0.2
    assert data.centre_crop(np.ones((40, 40, 1), np.uint8), 8).shape == (8, 8, 1)


def test_normalization():
    mean, std = data.normalization(make_dataset(kind="cifar10"))
    np.testing.assert_allclose(mean, (0.4914, 0.4822, 0.4465), rtol=1e-6)
    np.testing.assert_allclose(std, (0.2470, 0.2435, 0.2616), rtol=1e-6)
    dataset = make_dataset(kind="other")
    images = dataset.train.images / 255
    mean, std = data.normalization(dataset)
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, images.std((0, 1, 2)), rtol=1e-6)


# Models.


def conv(inside, outside, size=3):
    return size**2 * inside * outside + 2 * outside  # with BatchNorm


def resnet(width, stages, channels, classes, stem):
    total, inside = conv(channels, width, stem), width
    for stage, blocks in enumerate(stages):
        outside = width * 2**stage
        for _ in range(blocks):
            total += conv(inside, outside) + conv(outside, outside)
            total += conv(inside, outside, 1) if inside != outside else 0
            inside = outside
    return total + inside * classes + classes


def vgg(channels, classes):
    total, inside = 0, channels
    for outside in (64, 64, 128, 128, *(256,) * 3, *(512,) * 6):
        total += conv(inside, outside)
        inside = outside
    return total + 512 * classes + classes


@pytest.mark.parametrize(
    ("name", "large", "classes", "expected", "convolutions"),
    [
        ("resnet18", False, 10, resnet(64, (2,) * 4, 3, 10, 3), 20),
        ("resnet18", True, 1000, resnet(64, (2,) * 4, 3, 1000, 7), 20),
        ("resnet20", False, 10, resnet(16, (3,) * 3, 3, 10, 3), 21),
        ("vgg16", False, 100, vgg(3, 100), 13),
    ],
)
def test_parameters(name, large, classes, expected, convolutions):
    build = lambda: models.make_model(name, 0, classes=classes, large=large)  # noqa: E731
    params = nnx.state(nnx.eval_shape(build), nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected
    metrics = so.describe_groups(params, models.GROUPS).splitlines()[1:]
    grouped = [line.split() for line in metrics if line.split()[-2] != "-"]
    assert len(grouped) == convolutions
    assert all("conv" in line[0] for line in grouped)
    sizes = {"resnet18": 11_173_962, "resnet20": 272_474, "vgg16": 14_770_212}
    if not large:
        assert expected == sizes[name]


@pytest.mark.parametrize(
    ("name", "large", "side", "shapes"),
    [
        ("resnet18", False, 32, [32] * 5 + [16] * 4 + [8] * 4 + [4] * 4),
        ("resnet18", True, 224, [112] + [56] * 4 + [28] * 4 + [14] * 4 + [7] * 4),
        ("resnet20", False, 28, [28] * 7 + [14] * 6 + [7] * 6),
        ("vgg16", False, 28, [32] * 2 + [16] * 2 + [8] * 3 + [4] * 3 + [2] * 3),
    ],
)
def test_shapes(name, large, side, shapes, monkeypatch):
    found = []
    call = models.BatchNorm.__call__

    def record(norm, x):
        found.append(x.shape[1])
        return call(norm, x)

    monkeypatch.setattr(models.BatchNorm, "__call__", record)

    def forward(x):
        model = models.make_model(name, 0, width=2, large=large, classes=7)
        monkeypatch.setattr(models.Block, "__call__", plain_block)
        return model(x)

    def plain_block(block, x):
        y = block.norm2(block.conv2(nnx.relu(block.norm1(block.conv1(x)))))
        return y + (block.shortcut_conv(x) if block.projects else x)

    logits = jax.eval_shape(forward, jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32))
    assert logits.shape == (2, 7)
    assert found == shapes


def test_initial_weights_are_those_of_pytorch():
    model = models.make_model("resnet18", 0, width=16)
    state = nnx.state(model, nnx.Param)
    for kernel in (model.stem_conv.kernel, model.blocks[3].conv2.kernel, model.linear.kernel):
        bound = np.prod(kernel.shape[:-1]) ** -0.5
        values = np.asarray(kernel[...])
        assert 0.97 * bound < np.abs(values).max() <= bound
        assert np.isclose(values.std(), bound / 3**0.5, rtol=0.05)
    assert np.abs(model.linear.bias[...]).max() <= model.linear.kernel.shape[0] ** -0.5
    other = nnx.state(models.make_model("resnet18", 1, width=16), nnx.Param)
    assert not np.allclose(state["stem_conv"]["kernel"][...], other["stem_conv"]["kernel"][...])


def test_batch_norm():
    x = jnp.asarray(np.random.default_rng(0).normal(2, 3, (8, 5, 5, 3)), jnp.float32)
    norm, flax = models.BatchNorm(3), nnx.BatchNorm(3, momentum=0.9, epsilon=1e-5, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(norm(x), flax(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], flax.mean[...], rtol=1e-5)
    unbiased = 0.9 + 0.1 * np.var(x, axis=(0, 1, 2), ddof=1)
    np.testing.assert_allclose(norm.var[...], unbiased, rtol=1e-5)
    norm.eval()
    expected = (x - norm.mean[...]) / jnp.sqrt(norm.var[...] + 1e-5)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_of_parts_is_that_of_each():
    x = jnp.asarray(np.random.default_rng(0).normal(2, 3, (8, 5, 5, 3)), jnp.float32)
    parts, alone = models.BatchNorm(3, parts=4), [models.BatchNorm(3) for _ in range(4)]
    expected = jnp.concatenate([norm(x[2 * i : 2 * i + 2]) for i, norm in enumerate(alone)])
    np.testing.assert_allclose(parts(x), expected, rtol=1e-5, atol=1e-6)
    for name in ("mean", "var"):
        kept = np.mean([getattr(norm, name)[...] for norm in alone], axis=0)
        np.testing.assert_allclose(getattr(parts, name)[...], kept, rtol=1e-6)


def test_bfloat16_is_of_activations_only():
    model = models.make_model("resnet20", 0, width=2, dtype=jnp.bfloat16)
    assert model.stem_norm(model.stem_conv(jnp.ones((2, 8, 8, 3)))).dtype == jnp.bfloat16
    assert model(jnp.ones((2, 8, 8, 3))).dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}


# A second ResNet18, in NumPy from its description, with PyTorch's padding, strides and pooling.


def numpy_conv(x, kernel, stride=1):
    size, side = kernel.shape[0], x.shape[1]
    pad, out = (size - 1) // 2, (side - 1) // stride + 1
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    last = stride * (out - 1) + 1
    return sum(
        x[:, i : i + last : stride, j : j + last : stride] @ kernel[i, j]
        for i in range(size)
        for j in range(size)
    )


def numpy_max_pool(x):
    side = x.shape[1]
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    parts = [x[:, i : i + side : 2, j : j + side : 2] for i in range(3) for j in range(3)]
    return np.max(parts, axis=0)


def numpy_resnet18(weights, x, large, *, train):
    """The output of a ResNet18; `weights` maps paths to kernels and BatchNorm's four vectors."""

    def norm(x, name):
        scale, bias, mean, var = (
            weights[f"{name}/{part}"] for part in ("scale", "bias", "mean", "var")
        )
        if train:
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        return scale * (x - mean) / np.sqrt(var + 1e-5) + bias

    def layer(x, conv, stride=1):
        kernel = weights[f"{conv}/kernel"]
        return norm(numpy_conv(x, kernel, stride), conv.replace("conv", "norm"))

    x = np.maximum(layer(x, "stem_conv", 2 if large else 1), 0)
    if large:
        x = numpy_max_pool(x)
    for i in range(8):
        stride = 2 if i in (2, 4, 6) else 1
        name = f"blocks/{i}"
        y = layer(np.maximum(layer(x, f"{name}/conv1", stride), 0), f"{name}/conv2")
        x = np.maximum(y + (layer(x, f"{name}/shortcut_conv", stride) if stride == 2 else x), 0)
    return x.mean((1, 2)) @ weights["linear/kernel"] + weights["linear/bias"]


@pytest.mark.parametrize(("large", "side"), [(False, 32), (False, 27), (True, 96)])
def test_resnet18_has_the_published_forward_function(large, side, x64):
    rng = np.random.default_rng(0)
    model = models.make_model("resnet18", 0, width=6, large=large, dtype=jnp.float64)
    graph, state = nnx.split(model)
    weights, changed = {}, []
    for path, leaf in nnx.to_flat_state(state):
        shape = leaf.shape
        draw = rng.uniform(0.5, 2, shape) if path[-1] == "var" else rng.normal(size=shape)
        name = "/".join(map(str, path))
        weights[name] = draw * np.prod(shape[:-1]) ** -0.5 if len(shape) > 1 else draw
        changed.append((path, leaf.replace(jnp.asarray(weights[name]))))
    state = nnx.from_flat_state(changed)
    x = rng.normal(size=(3, side, side, 3))
    for train in (True, False):
        model = nnx.merge(graph, state, copy=True)
        model.train() if train else model.eval()
        found = nnx.jit(lambda model, x: model(x))(model, x)
        assert found.dtype == jnp.float64
        expected = numpy_resnet18(weights, x, large, train=train)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


# Published values.


def test_published_values():
    rows = published.RESULTS
    assert rows["adamsrt"]["cifar10", "resnet18"] == (94.92, 0.05)
    assert rows["sgd"]["imagenet", "resnet18"] == (69.86, 0.06)
    assert rows["adamw"]["cifar100", "vgg16"] == (71.37, 0.22)
    assert rows["adams"]["svhn", "vgg16"] == (95.66, 0.09)
    assert sum(map(len, rows.values())) == 6 * 8 - 2  # two cells are empty
    settings = published.HYPERPARAMETERS
    assert settings["adamsrt"]["svhn", "vgg16"] == (1e-3, 2.5e-4, 0.9, 0.999)
    assert settings["adam"]["cifar10", "resnet18"] == (1e-3, 7.8125e-6, 0.9, 0.999)
    assert settings["adamw"]["cifar10", "resnet20"] == (1e-3, 1e-2, 0.9, 0.99)
    assert settings["sgdmrt"]["cifar100", "vgg16"][:3] == (0.1, 1.25e-4, 0.9)
    assert settings["adamg"]["cifar10", "vgg16"] == (1e-2, 5e-4, 0.9, 0.999)
    assert sum(map(len, settings.values())) == 7 * 8 - 2
    assert len(published.DECAY_GRID) == 8
    odd = {("adamw", ("cifar10", "resnet20"))}  # PyTorch's default
    for name, cells_of in settings.items():
        for cell, found in cells_of.items():
            in_grid = np.isclose(found.weight_decay, published.DECAY_GRID, rtol=1e-6, atol=1e-12)
            assert in_grid.any() == ((name, cell) not in odd), (name, cell)


def parse(*arguments):
    return tyro.cli(options.Command, args=[str(each) for each in arguments])


def cell_of(*arguments, dataset=None):
    command = parse("run", "--data", "x", *arguments)
    return cells.run_cell(command, dataset or make_dataset(side=32)), command


@pytest.mark.parametrize(
    ("kind", "model", "expected"),
    [
        ("cifar10", "resnet18", (405, 128, 1024, 0.05, "crop_flip", 1e-3, 7.8125e-6, 0.99)),
        ("cifar100", "resnet18", (405, 128, 128, 0.05, "crop_flip", 1e-3, 0.0, 0.999)),
        ("svhn", "vgg16", (405, 128, 1024, 0.05, "none", 1e-3, 2.5e-4, 0.999)),
        ("imagenet", "resnet18", (405, 256, 512, 0.0, "resized_crop", 1e-3, 7.8125e-6, 0.999)),
    ],
)
def test_a_cell_takes_the_published_values(kind, model, expected):
    dataset = make_dataset(kind=kind, n=1000)._replace(
        shape=None if kind == "imagenet" else (32, 32, 3)
    )
    arguments = ("--model", model, "--optimizer", "adamsrt")
    cell, command = cell_of(*arguments, dataset=dataset)
    names = ("epochs", "batch_size", "test_batch_size", "validation", "augmentation")
    names += ("learning_rate", "weight_decay", "b2")
    assert tuple(getattr(cell, name) for name in names) == expected
    assert (cell.b1, cell.protocol, cell.schedule) == (0.9, "published", "steps")
    assert cells.seeds_of(command) == (0,)
    assert cell.large == (kind == "imagenet")
    sound, command = cell_of(*arguments, "--protocol", "sound", dataset=dataset)
    assert sound.validation == 0.05
    assert cells.seeds_of(command) == (0, 1, 2, 3, 4)


def test_every_value_can_be_overridden():
    given = {
        "epochs": 3,
        "schedule": "cosine",
        "batch_size": 10,
        "test_batch_size": 20,
        "b1": 0.8,
        "b2": 0.7,
        "width": 5,
        "train_images": 60,
        "test_images": 30,
        "validation": 0.1,
        "augmentation": "crop",
        "image_size": 24,
        "learning_rate": 0.5,
        "weight_decay": 0.25,
        "batch_norm": "device",
        "dtype": "bfloat16",
        "protocol": "sound",
    }
    arguments = [x for k, v in given.items() for x in (f"--{k.replace('_', '-')}", v)]
    cell, _ = cell_of("--model", "resnet18", "--optimizer", "adam", *arguments)
    assert {name: getattr(cell, name) for name in given} == given
    assert (
        cell.name != cell_of("--model", "resnet18", "--optimizer", "adam", *arguments[2:])[0].name
    )


def test_learning_rate_is_a_tenth_after_the_published_epochs():
    cell, _ = cell_of("--model", "resnet18", "--optimizer", "sgd", dataset=make_dataset(1000, 32))
    schedule = training.make_schedule(cell, 405 * 7)(0.1)
    for epoch, times in ((0, 1), (134, 1), (135, 0.1), (224, 0.1), (225, 0.01), (315, 0.001)):
        # Optax lowers the rate after the boundary's step.
        np.testing.assert_allclose(schedule(7 * epoch + 1), 0.1 * times, rtol=1e-5)


def refused(*arguments):
    with pytest.raises(SystemExit, match=r"^examples.paper: .*expected .*, found ") as error:
        program.main(parse(*arguments))
    return str(error.value)


def test_bad_options(tmp_path):
    write_mnist(tmp_path / "data")
    start = ["run", "--data", tmp_path / "data", "--out", tmp_path / "out", "--optimizer", "adam"]
    small = [*start, "--preset", "small", "--train-images", "30", "--batch-size", "10"]
    assert "--model: expected a model" in refused(*start)
    assert "none published for other resnet18 adam" in refused(*start, "--model", "resnet18")
    for option, value, text in (
        ("--epochs", "0", "at least 1, found 0"),
        ("--batch-size", "1", "at least 2, found 1"),
        ("--batch-size", "64", "--train-images: expected at least a batch, found 30"),
        ("--validation", "1.0", "a part in [0, 1), found 1.0"),
        ("--learning-rate", "-1", "a positive number, found -1.0"),
        ("--weight-decay", "-1", "a number not below 0, found -1.0"),
        ("--b2", "1", "a number in [0, 1), found 1.0"),
        ("--seeds", "-1", "at least one of at least 0, found (-1,)"),
        ("--log-every", "0", "at least 1, found 0"),
    ):
        assert text in refused(*small, option, value), option
    rotational = [*small, "--optimizer", "rotational_adamw", "--weight-decay", "0"]
    assert "above 0, which sets the angle" in refused(*rotational)
    assert f"{tmp_path / 'none'}: expected a folder, found nothing" in refused(
        "run", "--data", tmp_path / "none", "--optimizer", "adam", "--out", tmp_path / "out"
    )
    assert "expected folders with result.json, found none" in refused("table", "--out", tmp_path)
    for command in ("run", "sweep", "table", "plot"):
        (tmp_path / "file").write_text("")
        required = ["--data", tmp_path] if command in ("run", "sweep") else []
        required += ["--optimizer", "adam"] if command == "run" else []
        with pytest.raises(SystemExit, match=r"--out: .*expected a directory, found a file"):
            program.main(parse(command, *required, "--out", tmp_path / "file"))


# Training.

TINY = ["--preset", "small", "--width", "2", "--train-images", "60", "--test-images", "20"]
TINY += [
    "--validation",
    "0.14",
    "--epochs",
    "2",
    "--batch-size",
    "20",
    "--test-batch-size",
    "20",
    "--log-every",
    "1",
]


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    path = tmp_path_factory.mktemp("mnist")
    write_mnist(path, 70, 20, side=10)
    return path


@pytest.fixture
def short(monkeypatch):
    """Makes ResNets of one block, which compile in a fraction of the time."""
    build = models.ResNet

    def make(layers, channels, classes, width, _, **more):
        return build(layers, channels, classes, width, (1,), **more)

    monkeypatch.setattr(models, "ResNet", make)
    training.program_of.cache_clear()
    yield
    training.program_of.cache_clear()


@pytest.mark.slow
def test_sweep_shares_its_program_and_skips_what_is_finished(short, mnist, tmp_path, monkeypatch):
    steps, made = [], []
    kept = training.Program

    class Counting(kept):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)
            step = self.step
            self.step = lambda *a: (steps.append(1), step(*a))[1]
            self.compiled = step._cache_size

    monkeypatch.setattr(training, "Program", Counting)
    arguments = ["--data", mnist, "--optimizers", "sgdmrt", "adamg", "--learning-rates", "0.01"]
    arguments += ["0.03", "--weight-decays", "0", "1e-3", "--seeds", "0", "1", "--out", tmp_path]
    arguments += ["--search-seeds", "7"]
    program.main(parse("sweep", *TINY, *arguments))
    assert len(made) == 2
    assert [each.compiled() for each in made] == [1, 1]
    assert len(steps) == 2 * (4 + 2) * 2 * 3  # optimizers, runs, epochs, steps
    found = results.read_results(tmp_path)
    assert len(found) == 12
    assert not list(tmp_path.glob("*/checkpoints"))
    for name in ("sgdmrt", "adamg"):
        runs = [run for run in found if run["cell"]["optimizer"] == name]
        search = [run for run in runs if run["role"] == "search"]
        report = [run for run in runs if run["role"] == "report"]
        assert [run["cell"]["seed"] for run in search] == [7] * 4
        assert {run["test_accuracy"] for run in search} == {None}
        best = max(search, key=lambda run: run["validation_accuracy"])
        assert best["validation_accuracy"] in {
            run["validation_accuracy"]
            for run in search
            if run["cell"]["learning_rate"] == report[0]["cell"]["learning_rate"]
        }

    before = {path: path.read_bytes() for path in tmp_path.glob("*/result.json")}
    removed = next(path for path in before if "sgdmrt" in path.parent.name)
    removed.unlink()
    steps.clear()
    program.main(parse("sweep", *TINY, *arguments))
    assert len(steps) == 2 * 3  # one run: that whose result is missing
    again = json.loads(removed.read_bytes())
    assert again["sha256"] == json.loads(before[removed])["sha256"]
    for path, content in before.items():
        assert path == removed or path.read_bytes() == content

    program.main(parse("table", "--out", tmp_path))
    program.main(parse("plot", "--out", tmp_path))
    (column,) = json.loads((tmp_path / "table.json").read_text())["columns"]
    assert [row["optimizer"] for row in column["rows"]] == ["adamg", "sgdmrt"]
    for row in column["rows"]:
        assert row["seeds"] == [0, 1]
        assert row["settings_tried"] == 4
        assert not row["search_only"]
    assert "| AdamG | " in (tmp_path / "table.md").read_text()
    assert (tmp_path / "other-resnet20.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", published.OPTIMIZERS)
def test_optimizers_move_as_they_should(name):
    """Hyperparameters may be traced, fixed radii stay, and weight decay moves the other weights."""
    rng = np.random.default_rng(0)
    params = {
        "conv": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 2, 4)), jnp.float32)},
        "linear": {"kernel": jnp.ones((4, 2))},
    }
    x = params["conv"]["kernel"]
    before = so.geometry.norm(x, so.per_filter())
    constant = lambda rate: lambda count: rate  # noqa: E731
    radius = lambda updates: so.geometry.norm(x + updates["conv"]["kernel"], so.per_filter())  # noqa: E731

    def move(decay, grads):
        setting = optimizers.Setting(0.1, decay, 0.9, 0.99)
        state = make(setting).init(params)
        updates, state = jax.jit(lambda s: make(s).update(grads, state, params))(setting)
        return updates, training.layer_metrics(state)["conv"]["kernel"]

    def make(setting):
        tx = optimizers.make_optimizer(name, setting, constant)
        return optimizers.record(name, tx, setting)

    def check_layers(metrics, updates):
        after = radius(updates)
        angle = so.geometry.angle(x, x + updates["conv"]["kernel"], so.per_filter())
        np.testing.assert_allclose(metrics[:2], [after.mean(), angle.mean()], rtol=1e-4)
        if name == "rotational_adamw":
            assert np.isnan(metrics[2])
        elif name == "sgd":
            radial = x.sum((0, 1, 2)) / before  # of a gradient of ones, which moves forward too
            expected = np.mean(0.1 / before**2 / (1 - 0.1 * radial / before))
            np.testing.assert_allclose(metrics[2], expected, rtol=1e-4)
        else:
            assert metrics[2] > 0

    grads = jax.tree.map(jnp.ones_like, params)
    little, metrics = move(1e-6, grads)
    check_layers(metrics, little)
    much, _ = move(0.5, grads)
    if name in ("adamg", "hyperball", "rotational_adamw"):
        expected = jnp.ones(4) if name == "adamg" else before
        np.testing.assert_allclose(radius(little), expected, rtol=1e-5)
        np.testing.assert_allclose(radius(much), expected, rtol=1e-5)
    else:
        assert not np.allclose(little["conv"]["kernel"], much["conv"]["kernel"], rtol=1e-3)
    quiet, _ = move(0.5, jax.tree.map(jnp.zeros_like, params))
    decoupled = name in ("adamw", "rotational_adamw")
    shrink = 0.05 if decoupled or name.startswith("sgd") else 0.1  # Adam makes full steps of L2
    np.testing.assert_allclose(quiet["linear"]["kernel"], -shrink * jnp.ones((4, 2)), rtol=1e-4)


def test_accuracy_over_images_and_over_batches():
    counts = [jnp.array([8.0, 10.0]), jnp.array([1.0, 5.0])]
    assert np.isclose(training.accuracy(iter(counts), "published"), (0.8 + 0.2) / 2)
    assert np.isclose(training.accuracy(iter(counts), "sound"), 9 / 15)


# A program that runs several commands in one process, and the short network of these tests.
COMMANDS = """
import json, sys
from examples.paper import __main__ as program, options
import tyro
for arguments in json.loads(sys.argv[1]):
    program.main(tyro.cli(options.Command, args=arguments))
"""
SHORT = """
from examples.paper import models
build = models.ResNet
def short(layers, channels, classes, width, _, **more):
    return build(layers, channels, classes, width, (1,), **more)
models.ResNet = short
"""


def start(*commands, devices=1, cache=CACHED, whole=False):
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK}"
    arguments = json.dumps([[str(each) for each in command] for command in commands])
    return subprocess.Popen(
        [sys.executable, "-c", ("" if whole else SHORT) + COMMANDS, arguments],
        env=os.environ | cache | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return out


def only_result(folder):
    (result,) = results.read_results(folder)
    return result


@pytest.mark.slow
def test_killed_and_resumed_it_ends_with_the_same_bits(short, mnist, tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ["run", *TINY, "--data", mnist, "--optimizer", "adamsrt", "--seeds", "3"]
    arguments += ["--augmentation", "crop_flip", "--epochs", "12", "--checkpoint-steps", "2"]
    arguments += ["--learning-rate", "1e-5"]
    program.main(parse(*arguments, "--out", whole))
    out = capsys.readouterr().out
    assert re.search(r"seed 3: test accuracy \d+\.\d\d % of epoch \d", out)
    expected = only_result(whole)

    # Without the compilation cache, because a killed process might leave half a file.
    process = start([*arguments, "--out", killed], cache={})
    try:
        checkpoint = wait_for(killed, process, 3 * expected["best_epoch"] + 1)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    # The selected epoch is before the checkpoint, so the checkpoint contains its weights.
    assert 3 * expected["best_epoch"] < checkpoint < 36
    assert not list(killed.glob("*/result.json"))
    finished(start([*arguments, "--out", killed]))
    found = only_result(killed)
    for name in ("sha256", "history", "test_accuracy", "best_epoch", "cell"):
        assert found[name] == expected[name], name
    assert len(found["history"]) == 12


def wait_for(folder, process, step):
    """Waits for a complete checkpoint of this step or a later one; returns its step."""
    while process.poll() is None:
        steps = [int(p.name) for p in folder.glob("*/checkpoints/*") if p.name.isdigit()]
        if max(steps, default=0) >= step:
            return max(steps)
        time.sleep(0.01)
    raise AssertionError(process.communicate()[1])


@pytest.mark.slow
def test_eight_devices_train_as_one(tmp_path):
    """An epoch of each network, in a narrow form, has the same loss on eight devices as on one."""
    write_cifar_binary(tmp_path, 10, 8)
    tiny = ["--width", "2", "--epochs", "1", "--batch-size", "16", "--test-batch-size", "8"]
    tiny += ["--validation", "0.2", "--protocol", "sound", "--optimizer", "adamsrt", "--seeds", "0"]

    def arguments(model, out, *more):
        return ["run", "--data", tmp_path, "--model", model, *tiny, "--out", tmp_path / out, *more]

    networks = ("resnet18", "resnet20", "vgg16")
    commands = [arguments(model, f"eight-{model}") for model in networks]
    commands.append(arguments("resnet20", "parts", "--batch-norm", "device"))
    odd = arguments("resnet20", "odd", "--batch-size", "12")
    process = start(*commands, odd, devices=8, whole=True)
    for model in networks:
        program.main(parse(*arguments(model, f"one-{model}")))
    _, errors = process.communicate()
    assert "--batch-size: expected a multiple of 8, the devices, found 12" in errors
    for model in networks:
        one, eight = (only_result(tmp_path / f"{name}-{model}") for name in ("one", "eight"))
        assert (one["devices"][:2], eight["devices"][:2]) == ("1 ", "8 ")
        losses = [each["history"][0]["loss"] for each in (one, eight)]
        np.testing.assert_allclose(*losses, rtol=2e-5, err_msg=model)
        if model == "resnet20":
            parts = only_result(tmp_path / "parts")["history"][0]["loss"]
            assert abs(parts - losses[0]) > 1e-3 * losses[0]


def test_a_damaged_image_stops_training_with_one_line(short, tmp_path):
    write_folders(tmp_path / "data")
    cut(tmp_path / "data" / "val" / "dog" / "0.png", 40)
    arguments = ["--data", tmp_path / "data", "--preset", "small", "--optimizer", "sgd"]
    arguments += [
        "--dtype",
        "bfloat16",
        "--image-size",
        "16",
        "--augmentation",
        "resized_crop",
        "--validation",
        "0.2",
    ]
    arguments += ["--train-images", "4", "--batch-size", "2", "--test-batch-size", "2"]
    message = refused("run", *arguments, "--out", tmp_path / "out")
    assert f"{tmp_path}/data/val/dog/0.png: expected an image, found" in message
    assert "\n" not in message


# The table.


def result_of(optimizer, accuracy, validation, seed, decay=0.0, role="report", **changed):
    cell = {"data": "cifar10", "model": "resnet18", "width": None, "protocol": "sound", "epochs": 4}
    cell |= {"schedule": "steps", "batch_size": 64, "train_images": None, "augmentation": "none"}
    cell |= {
        "batch_norm": "global",
        "dtype": "float32",
        "learning_rate": 0.1,
        "b1": 0.9,
        "b2": 0.99,
    }
    cell |= {"optimizer": optimizer, "weight_decay": decay, "seed": seed} | changed
    history = [
        {"loss": 1.0, "layers": {"a": [1.0, 0.1, 0.2]}, "accuracy": 0.5, "validation_accuracy": 0.5}
    ]
    return {
        "cell": cell,
        "role": role,
        "test_accuracy": accuracy,
        "validation_accuracy": validation,
        "history": history,
    }


def test_table(tmp_path, capsys):
    runs = [result_of("adamsrt", 0.9 + 0.01 * i, 0.8, seed=i) for i in range(3)]
    runs += [
        result_of("adamsrt", 0.99, 0.7, seed=i, decay=1e-3) for i in range(3)
    ]  # worse validated
    runs += [result_of("adamsrt", None, 0.9, seed=9, decay=1e-2, role="search")]
    runs += [result_of("adam", None, 0.7, seed=9, role="search")]
    runs += [result_of("sgd", 0.5, 0.5, seed=0, epochs=5)]
    for i, run in enumerate(runs):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "result.json").write_text(json.dumps(run))
    program.main(parse("table", "--out", tmp_path))
    text = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    lines = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("|")}
    # Student's t with two degrees of freedom: 4.3027 standard errors of 1 / sqrt(3).
    assert "| 91.00 (1.00) [88.52, 93.48], n=3 | 94.92 (.05) |" in text
    assert "| Adam | 70.00*, n=1 | 93.77 (.20) | - | 93.77 (.20) |" in text
    assert "| SGD-M | - | 95.10 (.04) | 50.00, n=1 | 95.10 (.04) |" in text
    assert "| SGD-MRT |" not in lines
    assert "* Validation accuracy of the search" in text
    content = json.loads((tmp_path / "table.json").read_text())
    (row,) = [r for r in content["columns"][0]["rows"] if r["optimizer"] == "adamsrt"]
    assert row["per_seed"] == pytest.approx([90, 91, 92])
    assert row["weight_decay"] == 0.0
    assert row["settings_tried"] == 3
    assert row["published"] == {"mean": 94.92, "std": 0.05}
    (tmp_path / "0" / "result.json").write_text("{")
    assert "result.json: expected the result of a run" in refused("table", "--out", tmp_path)
    assert "a number in (0, 1), found 1.0" in refused("table", "--confidence", "1")


def test_best_setting_is_chosen_by_mean_validation():
    cell, _ = cell_of(
        "--model", "resnet18", "--optimizer", "adam", "--epochs", "1", "--batch-size", "9"
    )
    grid = [cells.dataclasses.replace(cell, learning_rate=rate) for rate in (0.1, 0.2)]
    runs = sweep.with_seeds(grid, (5, 6))
    assert [run.seed for run in runs] == [5, 6, 5, 6]
    scores = [{"validation_accuracy": v} for v in (0.9, 0.1, 0.6, 0.6)]
    assert sweep.best_of(scores, runs) == grid[1]
