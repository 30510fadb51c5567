"""Documents in memory: what comes of them is pinned, how they are kept is not."""

import hashlib
import itertools
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data import Split, load, open_batches
from data.files import Files
from data.rows import MemoryRows
from data.texts import Texts, _copied


def corpus(count=400, seed=11):
    """Documents of 1 to 900 bytes, a few of them twice."""
    rng = np.random.default_rng(seed)
    texts = ["".join(map(chr, rng.integers(97, 123, rng.integers(1, 900)))) for _ in range(count)]
    return [*texts, *texts[::50], "ä ö"]


@pytest.fixture(scope="module")
def texts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus()))
    return path


def split_of(path, protocol, streamed=False) -> Split:
    source = Files(str(path), "text", 0 if streamed else 2**20)
    return load(source, length=64, protocol=protocol, held_out_share=0.1, held_out_bytes=5_000)


def digest(rows):
    """A hash of rows or batches, dtypes and shapes included."""
    found = hashlib.blake2b(digest_size=8)
    for row in rows:
        for name in sorted(row):
            value = np.asarray(row[name])
            found.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
    return found.hexdigest()


def batches_of(split, count=30, state=None):
    batches = open_batches(split, batch=8, seed=5, state=state)
    found = list(itertools.islice(batches, count))
    state = batches.state()
    batches.close()
    return found, state


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("protocol", ["crop", "cut", "pack"])
def test_batches_held_out_rows_and_fingerprints_are_what_they_were(texts_file, protocol, streamed):
    split = split_of(texts_file, protocol, streamed)
    batches, _ = batches_of(split)
    found = split.fingerprint, digest(batches), digest(split.held_out_rows(4_000)), len(split.held_out)
    assert found == PINNED[protocol, streamed]


PINNED = {
    ("crop", False): ("f8bc56c2f5e84ad8", "0e7709fa2e906128", "2c29e2375ebbdf5e", 323),
    ("crop", True): ("1188b3b1576101af", "45c83e827bcb9b19", "13139c0d8cf2ad49", 84),
    ("cut", False): ("f8bc56c2f5e84ad8", "1a2731aedf5306a2", "4771119ae6168d73", 44),
    ("cut", True): ("e3641e02e3686114", "174c470d7d63c154", "4771119ae6168d73", 44),
    ("pack", False): ("f8bc56c2f5e84ad8", "83a0870cc3dc4aa9", "839ea27d52d6ee5a", 303),
    ("pack", True): ("1188b3b1576101af", "8452d98aad64ec6c", "63e2b649964038c7", 80),
}
"""Fingerprint, batches, held-out rows and their number, as they were when every document was an object of its own."""


def test_a_copy_for_another_process_reads_the_same_memory():
    """Where that is possible; elsewhere it has the bytes itself."""
    texts = Texts.of([b"a" * 100_000, b"b", b"c" * 100_000]).take(np.array([2, 0]))
    pickled = pickle.dumps(texts)
    assert len(pickled) < 2_000 or not Path(f"/proc/{os.getpid()}/fd").exists()
    copied = pickle.loads(pickled)
    assert list(copied) == [b"c" * 100_000, b"a" * 100_000] == list(texts)
    content = texts._buffer.bytes.tobytes()
    assert _copied(content).bytes.tobytes() == content


def test_documents_are_read_by_number_slice_and_view():
    texts = Texts.of(iter([b"one", b"two", b""]))
    assert list(texts) == [b"one", b"two", b""]
    assert list(texts[1:]) == [b"two", b""]
    assert texts.with_bos(1).tobytes() == b"\xfetwo"
    assert not texts.with_bos(1).flags.writeable
    assert Texts.of(texts) is texts
    assert list(Texts.of([])) == []


def test_text_takes_a_byte_of_memory_for_each_of_its_own():
    source = (b"%07d" % number * 1000 for number in range(1000))
    tracemalloc.start()
    try:
        rows = MemoryRows(Texts.of(source), 256, "crop", random=True)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows) == 27_000
    # Beside the buffer, which is no object of Python's.
    assert held < 100_000
    assert peak < 300_000
