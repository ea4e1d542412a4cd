"""Reading GGUF files: everything a sound file holds, and a clear refusal of every broken one."""

from __future__ import annotations

import os
import pickle
import struct
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.gguf_models import large_vocabulary, tiny_config, write_model

from redshard.loader.gguf.gguf_file import GGUFError, GGUFFile
from redshard.loader.gguf.quant_types import QuantType
from redshard.loader.model.architectures import read_config
from redshard.loader.model.configuration import UnsupportedModelError
from redshard.loader.model.tensors import ModelTensors

DATA = Path(__file__).parents[2] / "data" / "conformance"
KIT = Path(__file__).parents[4] / "shared"
ALL_FILES = sorted({*DATA.glob("*.gguf"), *KIT.glob("conformance/*.gguf"), *KIT.glob("vocabs/*.gguf")})

UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 6, 7, 8, 9, 10


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def key_value(key: str | bytes, value_type: int, payload: bytes) -> bytes:
    return string(key) + u32(value_type) + payload


def tensor(name: str, dimensions: list[int], type_id: int = 0, offset: int = 0) -> bytes:
    return string(name) + u32(len(dimensions)) + b"".join(map(u64, dimensions)) + u32(type_id) + u64(offset)


def gguf_bytes(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = bytes(256),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    """A file of these parts; the counts can be made to lie."""
    keys, tensors = keys or [], tensors or []
    head = magic + u32(version)
    head += u64(len(tensors) if n_tensors is None else n_tensors)
    head += u64(len(keys) if n_keys is None else n_keys)
    head += b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def refuse(path: Path, content: bytes, reason: str) -> GGUFError:
    path.write_bytes(content)
    with pytest.raises(GGUFError, match=reason) as caught:
        GGUFFile.open(path)
    assert str(path) in str(caught.value)
    return caught.value


# ---- sound files


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: path.name)
def test_agrees_with_the_gguf_package(path: Path) -> None:
    reader = gguf.GGUFReader(path)
    with GGUFFile.open(path) as file:
        assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
        for theirs in reader.tensors:
            ours = file.tensors[theirs.name]
            assert ours.type.name == theirs.tensor_type.name
            assert ours.shape == tuple(int(n) for n in reversed(theirs.shape))
            assert (ours.nbytes, ours.offset, ours.path) == (theirs.n_bytes, theirs.data_offset, path)
            stored = file.tensor_bytes(theirs.name)
            assert stored.dtype == np.uint8
            np.testing.assert_array_equal(stored, theirs.data.reshape(-1).view(np.uint8))
        fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        assert list(file.metadata) == list(fields)
        for key, field in fields.items():
            value = file.metadata[key]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()


def test_every_kind_of_value(tmp_path: Path) -> None:
    path = tmp_path / "values.gguf"
    scalars = {
        0: ("<B", 255),
        1: ("<b", -128),
        2: ("<H", 65535),
        3: ("<h", -32768),
        4: ("<I", 2**32 - 1),
        5: ("<i", -(2**31)),
        6: ("<f", 0.25),
        7: ("<?", True),
        10: ("<Q", 2**64 - 1),
        11: ("<q", -(2**63)),
        12: ("<d", 0.1),
    }
    keys = [key_value(f"s{kind}", kind, struct.pack(*value)) for kind, value in scalars.items()]
    keys += [
        key_value(f"a{kind}", ARRAY, u32(kind) + u64(3) + struct.pack(*value) * 3)
        for kind, value in scalars.items()
    ]
    keys += [
        key_value("text", STRING, string("naïve")),
        key_value("empty", STRING, string("")),
        key_value("not utf-8", STRING, string(b"a\xffb")),
        key_value("texts", ARRAY, u32(STRING) + u64(3) + string("one") + string("") + string("три")),
        key_value("no texts", ARRAY, u32(STRING) + u64(0)),
        key_value("no numbers", ARRAY, u32(FLOAT32) + u64(0)),
    ]
    path.write_bytes(gguf_bytes(keys))
    with GGUFFile.open(path) as file:
        for kind, (_, expected) in scalars.items():
            value = file.metadata[f"s{kind}"]
            assert value == expected
            assert type(value) is type(expected)
            array = file.metadata[f"a{kind}"]
            assert isinstance(array, np.ndarray)
            assert array.tolist() == [expected] * 3
        assert file.metadata["text"] == "naïve"
        assert file.metadata["empty"] == ""
        assert file.metadata["not utf-8"] == "a\N{REPLACEMENT CHARACTER}b"
        assert file.metadata["texts"] == ["one", "", "три"]
        assert file.metadata["no texts"] == []
        assert len(file.metadata["no numbers"]) == 0  # type: ignore[arg-type]
        assert file.metadata["texts"] is file.metadata["texts"]
        assert "missing" not in file.metadata


@pytest.mark.parametrize("version", [2, 3])
def test_versions_and_odd_layouts(tmp_path: Path, version: int) -> None:
    path = tmp_path / "odd.gguf"
    tensors = [
        tensor("last", [3], offset=192),
        tensor("first", [2, 3, 2, 1], type_id=24),
        tensor("scalar", [], type_id=27, offset=64),
    ]
    path.write_bytes(gguf_bytes(None, tensors, bytes(range(204)), version=version))
    with GGUFFile.open(path) as file:
        assert file.version == version
        assert list(file.tensors) == ["last", "first", "scalar"]
        assert file.tensors["first"].shape == (1, 2, 3, 2)
        assert file.tensors["scalar"].shape == ()
        assert file.tensor_bytes("first").tolist() == list(range(12))
        assert file.tensor_bytes("scalar").tolist() == list(range(64, 72))
        assert file.tensor_bytes("last").tolist() == list(range(192, 204))


def test_alignment_key_places_the_data(tmp_path: Path) -> None:
    path = tmp_path / "aligned.gguf"
    head = gguf_bytes([key_value("general.alignment", UINT32, u32(1024))], [tensor("t", [4])], b"")
    path.write_bytes(head.ljust(1024, b"\0") + bytes(range(16)))
    with GGUFFile.open(path) as file:
        assert file.tensors["t"].offset == 1024
        assert file.tensor_bytes("t").tolist() == list(range(16))


def test_views_are_read_only_and_outlive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "views.gguf"
    path.write_bytes(gguf_bytes(None, [tensor("t", [64])], bytes(range(256))))
    with GGUFFile.open(path) as file:
        view = file.tensor_bytes("t")
        with pytest.raises(GGUFError, match="no tensor 'u'"):
            file.tensor_bytes("u")
    assert not view.flags.writeable
    assert not view.flags.owndata
    assert view.tolist() == list(range(256))
    with pytest.raises(GGUFError, match="after the file was closed"):
        file.tensor_bytes("t")


def test_large_vocabulary_opens_quickly(tmp_path: Path) -> None:
    vocabulary = large_vocabulary(151936, ["<|bos|>", "<|eos|>"])
    config = tiny_config(n_vocab=151936, n_embd=32, n_layers=1, n_heads=1, n_kv_heads=1, tied_embeddings=True)
    path = write_model(tmp_path / "large.gguf", config, QuantType.Q4_0, vocabulary=vocabulary)
    start = time.perf_counter()
    with GGUFFile.open(path) as file:
        tokens, merges = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.merges"]
        seconds = time.perf_counter() - start
    assert tokens == vocabulary.tokens
    assert merges == vocabulary.merges
    assert seconds < 1.0


# ---- split sets


@pytest.fixture
def split_set(tmp_path: Path) -> list[Path]:
    write_model(tmp_path / "model.gguf", tiny_config(), seed=3, tensors_per_file=8)
    return sorted(tmp_path.glob("model-*.gguf"))


def test_split_set_opens_from_any_file(split_set: list[Path], tmp_path: Path) -> None:
    whole = write_model(tmp_path / "whole.gguf", tiny_config(), seed=3)
    assert len(split_set) == 3
    with GGUFFile.open(whole) as expected:
        for path in split_set:
            with GGUFFile.open(path) as file:
                assert file.paths == split_set
                assert file.path == split_set[0]
                assert list(file.tensors) == list(expected.tensors)
                assert {key for key in file.metadata if not key.startswith("split.")} == set(
                    expected.metadata
                )
                for name, info in file.tensors.items():
                    np.testing.assert_array_equal(file.tensor_bytes(name), expected.tensor_bytes(name))
                    with info.path.open("rb") as stream:
                        stream.seek(info.offset)
                        assert stream.read(info.nbytes) == file.tensor_bytes(name).tobytes()


def test_missing_shard(split_set: list[Path]) -> None:
    split_set[1].unlink()
    with pytest.raises(
        GGUFError, match=r"1 of 3 files of the split set are missing: model-00002-of-00003\.gguf"
    ):
        GGUFFile.open(split_set[0])


def test_renamed_shard(split_set: list[Path]) -> None:
    renamed = split_set[0].rename(split_set[0].with_name("model.gguf"))
    with pytest.raises(GGUFError, match=r"part 1 of 3 .* its name must end in -00001-of-00003\.gguf"):
        GGUFFile.open(renamed)


def test_shards_in_each_others_place(split_set: list[Path]) -> None:
    split_set[1].write_bytes(split_set[2].read_bytes())
    with pytest.raises(GGUFError, match="is part 3 of 3, expected part 2 of 3"):
        GGUFFile.open(split_set[0])


def test_shard_of_another_set(split_set: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_model(other / "model.gguf", tiny_config(n_layers=1), tensors_per_file=5)
    split_set[2].write_bytes((other / "model-00003-of-00003.gguf").read_bytes())
    with pytest.raises(GGUFError, match="should hold 21 tensors, found 18"):
        GGUFFile.open(split_set[0])


def test_duplicate_tensor_in_two_shards(split_set: list[Path]) -> None:
    content = split_set[2].read_bytes()
    split_set[2].write_bytes(content.replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"))
    with pytest.raises(GGUFError, match=r"duplicate tensor 'blk\.0\.ffn_up\.weight'"):
        GGUFFile.open(split_set[0])


def test_broken_shard_is_named(split_set: list[Path]) -> None:
    split_set[1].write_bytes(b"GGUF")
    with pytest.raises(GGUFError, match="truncated") as caught:
        GGUFFile.open(split_set[0])
    assert caught.value.path == split_set[1]


# ---- broken files

HUGE = (1 << 63, (1 << 64) - 1, 1 << 40)


def test_missing_and_irregular_files(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="No such file"):
        GGUFFile.open(tmp_path / "missing.gguf")
    with pytest.raises(GGUFError, match="not a regular file"):
        GGUFFile.open(tmp_path)
    os.mkfifo(tmp_path / "fifo.gguf")
    with pytest.raises(GGUFError, match="not a regular file"):
        GGUFFile.open(tmp_path / "fifo.gguf")
    refuse(tmp_path / "empty.gguf", b"", "file is empty")


@pytest.mark.parametrize(
    ("content", "reason", "offset"),
    [
        (gguf_bytes(magic=b"GGML"), "not a GGUF file: it begins with b'GGML'", 0),
        (b"GG", "truncated: the magic", 0),
        (b"GGUF\3\0", "truncated: the version", 4),
        (gguf_bytes(version=1), "version 1 is not supported", 4),
        (gguf_bytes(version=4), "version 4 is not supported", 4),
        (gguf_bytes(version=0x03000000), "big-endian", 4),
        (b"GGUF" + u32(3) + u64(0), "truncated: the number of metadata keys", 16),
    ],
)
def test_bad_header(tmp_path: Path, content: bytes, reason: str, offset: int) -> None:
    assert refuse(tmp_path / "bad.gguf", content, reason).offset == offset


@pytest.mark.parametrize("count", [*HUGE, 1000])
def test_absurd_counts_cost_no_memory(tmp_path: Path, count: int) -> None:
    contents = [
        (gguf_bytes(n_keys=count), "metadata keys cannot fit"),
        (gguf_bytes(n_tensors=count), "tensors cannot fit"),
        (
            gguf_bytes([string("k") + u32(STRING) + u64(count)]),
            "truncated in the last string of the value of 'k'",
        ),
        (
            gguf_bytes([key_value("k", ARRAY, u32(STRING) + u64(count))]),
            "strings in the value of 'k' cannot fit",
        ),
        (
            gguf_bytes([key_value("k", ARRAY, u32(UINT64) + u64(count))]),
            "elements in the value of 'k' cannot fit",
        ),
        (gguf_bytes([u64(count)]), "truncated|metadata key 0 has"),
        (gguf_bytes(None, [u64(count)]), "truncated|name of tensor 0 has"),
    ]
    tracemalloc.start()
    for content, reason in contents:
        refuse(tmp_path / "absurd.gguf", content, reason)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_counts_beyond_the_limits_in_a_large_file(tmp_path: Path) -> None:
    """Counts that a (sparse) file is large enough for are refused without walking it."""
    path = tmp_path / "sparse.gguf"
    for content, reason in [
        (gguf_bytes(n_keys=1 << 30), "metadata keys are more than the"),
        (gguf_bytes(n_tensors=1 << 30), "tensors are more than the"),
        (
            gguf_bytes([key_value("k", ARRAY, u32(STRING) + u64(1 << 30))]),
            "strings in the value of 'k' are more",
        ),
    ]:
        path.write_bytes(content)
        os.truncate(path, 1 << 40)
        with pytest.raises(GGUFError, match=reason):
            GGUFFile.open(path)


def test_bad_metadata(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    one = key_value("k", UINT32, u32(1))
    error = refuse(path, gguf_bytes([one, one]), "duplicate metadata key 'k'")
    assert error.offset == 24 + len(one)
    refuse(path, gguf_bytes([key_value("k", 13, b"")]), "the value of 'k' has the unknown type 13")
    refuse(path, gguf_bytes([key_value("k", ARRAY, u32(99) + u64(1))]), "unknown type 99")
    refuse(path, gguf_bytes([key_value("k", ARRAY, u32(ARRAY) + u64(1))]), "array of arrays")
    refuse(path, gguf_bytes([key_value("", UINT32, u32(1))]), "metadata key 0 has 0 bytes")
    refuse(path, gguf_bytes([key_value(b"\xff", UINT32, u32(1))]), "metadata key 0 is not valid UTF-8")
    for alignment in (0, 1, 4, 12, 33):
        content = gguf_bytes([key_value("general.alignment", UINT32, u32(alignment))])
        refuse(path, content, "general.alignment must be a power of two")
    refuse(path, gguf_bytes([key_value("general.alignment", FLOAT32, bytes(4))]), "general.alignment must be")


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([tensor("t", [4]), tensor("t", [4], offset=32)], "duplicate tensor 't'"),
        ([tensor("t", [4], type_id=4)], "tensor 't': unknown tensor type 4"),
        ([tensor("t", [4], type_id=1000)], "tensor 't': unknown tensor type 1000"),
        ([tensor("t", [33, 2], type_id=2)], "rows of 33 do not divide into Q4_0 blocks of 32"),
        ([tensor("t", [4], offset=1)], "tensor 't': offset 1 is not aligned to 32 bytes"),
        ([tensor("t", [4], offset=1 << 63)], "tensor 't' of 16 bytes ends past the end"),
        ([tensor("t", [65])], "tensor 't' of 260 bytes ends past the end of the file, which has"),
        ([tensor("t", [4], offset=256)], "ends past the end"),
        ([tensor("a", [9]), tensor("b", [4], offset=32)], "tensors 'a' and 'b' overlap"),
        ([tensor("a", [4]), tensor("b", [4])], "tensors 'a' and 'b' overlap"),
        ([tensor("t", [1 << 32, 1 << 32])], "overflow 63 bits"),
        ([tensor("t", [1 << 62])], "overflow 63 bits"),
        ([tensor("t", [(1 << 64) - 1])], "overflow 63 bits"),
        ([tensor("t", [0])], "has no elements"),
        ([tensor("t", [1 << 40, 0, 1 << 40])], "has no elements"),
        ([tensor("t", [1] * 5)], "has 5 dimensions"),
        ([string("t") + u32(1 << 31)], "has 2147483648 dimensions"),
        ([tensor("", [4])], "the name of tensor 0 has 0 bytes"),
    ],
)
def test_bad_tensors(tmp_path: Path, tensors: list[bytes], reason: str) -> None:
    refuse(tmp_path / "bad.gguf", gguf_bytes(None, tensors), reason)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    config = tiny_config(n_embd=32, n_heads=1, n_kv_heads=1, n_ff=32, n_layers=1)
    whole = write_model(tmp_path / "whole.gguf", config).read_bytes()
    header = whole.index(b"blk.0.ffn_down.weight") + 100
    for length in [*range(1, 200), *range(200, header, 37), *range(header, len(whole) - 31, 4999)]:
        path.write_bytes(whole[:length])
        with pytest.raises(GGUFError):
            GGUFFile.open(path)


def use_everything(path: Path) -> None:
    with GGUFFile.open(path) as file:
        dict(file.metadata)
        for name, info in file.tensors.items():
            assert file.tensor_bytes(name).nbytes == info.nbytes
        ModelTensors(read_config(file), file)


EXTREMES = st.sampled_from(
    [0, 1, 2, 3, 31, 32, 255, 256, 1 << 31, (1 << 32) - 1, 1 << 62, 1 << 63, (1 << 64) - 1]
)


@settings(max_examples=500, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_raise_nothing_else(
    tmp_path: Path, data: st.DataObject, small_model: bytes, arch_of_small_model: str
) -> None:
    content = bytearray(small_model)
    # Where the tensors' data begins hardly matters; most edits should hit the header.
    header_end = content.rindex(b".weight") + 40
    position = st.integers(0, header_end) | st.integers(0, len(content))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(position)
        match data.draw(st.sampled_from(["byte", "u32", "u64", "cut", "insert", "delete", "copy"])):
            case "byte":
                content[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
            case "u32":
                content[at : at + 4] = u32(data.draw(EXTREMES) & 0xFFFFFFFF)
            case "u64":
                content[at : at + 8] = u64(data.draw(EXTREMES))
            case "cut":
                del content[at:]
            case "insert":
                content[at:at] = data.draw(st.binary(max_size=40))
            case "delete":
                del content[at : at + data.draw(st.integers(1, 64))]
            case "copy":
                source = data.draw(position)
                content[at : at + 16] = content[source : source + 16]
    path = tmp_path / "mutated.gguf"
    path.write_bytes(content)
    with suppress(GGUFError, UnsupportedModelError):
        use_everything(path)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def arch_of_small_model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def small_model(arch_of_small_model: str, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    config = tiny_config(
        arch_of_small_model, n_embd=32, n_heads=2, n_kv_heads=1, head_dim=16, n_ff=32, n_layers=1
    )
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    factors = np.ones(8, np.float32) if arch_of_small_model == "llama" else None
    return write_model(path, config, QuantType.Q8_0, freq_factors=factors).read_bytes()


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(GGUFError("a.gguf", "is broken", 7)))
    assert str(error) == "a.gguf: is broken (at byte 7)"
    assert (error.path, error.reason, error.offset) == (Path("a.gguf"), "is broken", 7)
