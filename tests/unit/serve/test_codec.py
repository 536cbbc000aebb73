"""The wire format: what goes in comes out, and what is hostile does not come in."""

from __future__ import annotations

import ast
import json
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save

from serve import codec
from serve.codec import CodecError, compress, decode, decompress, encode, negotiate

LIMITS = {"max_bytes": 1 << 20, "max_values": 1 << 16}


def file_of(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


floats = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=4, max_side=6),
    elements=st.floats(-1e4, 1e4, width=32),
)


@given(floats)
def test_fp32_gives_back_the_same_bits(z):
    found, metadata = decode(encode({"z": z}, precision="fp32", metadata={"task": "a"}), **LIMITS)
    np.testing.assert_array_equal(found["z"], z)
    assert (found["z"].shape, found["z"].dtype, metadata) == (z.shape, np.float32, {"task": "a"})


@given(floats)
def test_fp16_gives_back_what_float16_holds(z):
    np.testing.assert_array_equal(decode(encode({"z": z}), **LIMITS)[0]["z"], z.astype(np.float16).astype(np.float32))


@given(floats)
def test_int8_is_off_by_at_most_half_a_step_of_the_range(z):
    found = decode(encode({"z": z}, precision="int8"), **LIMITS)[0]["z"]
    span = float(z.max() - z.min()) if z.size else 0.0
    assert found.shape == z.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, z, rtol=1e-6, atol=span / 510 + 1e-6 * float(np.abs(z).max(initial=0)))


def test_int8_takes_a_scale_per_channel_of_a_map_and_keeps_the_zeros_of_a_relu():
    z = np.maximum(np.random.default_rng(0).normal(size=(3, 4, 5, 5)), 0).astype(np.float32)
    z[:, 2] *= 1000
    body = encode({"z": z}, precision="int8")
    found = decode(body, **LIMITS)[0]["z"]
    spans = z.max(axis=(2, 3)) - z.min(axis=(2, 3))
    assert (np.abs(found - z).max(axis=(2, 3)) <= spans / 509).all()
    assert (found[z == 0] == 0).all()
    assert len(body) < z.size + 3 * 4 * 8 + 300


def test_an_examples_int8_feature_does_not_depend_on_the_batch():
    z = np.random.default_rng(1).normal(size=(5, 8, 1, 1)).astype(np.float32)
    z[3] *= 1e4
    whole = decode(encode({"z": z}, precision="int8"), **LIMITS)[0]["z"]
    alone = decode(encode({"z": z[:1]}, precision="int8"), **LIMITS)[0]["z"]
    np.testing.assert_array_equal(whole[:1], alone)


def test_values_beyond_float16_keep_float32():
    z = np.array([1.0, 1e6], np.float32)
    np.testing.assert_array_equal(decode(encode({"z": z}), **LIMITS)[0]["z"], z)


@pytest.mark.parametrize("dtype", ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8"])
def test_integers_pass_as_they_are(dtype):
    steps = np.array([[0, 1], [2, 3]]).astype(dtype)
    found = decode(encode({"steps": steps}, precision="int8"), **LIMITS)[0]["steps"]
    np.testing.assert_array_equal(found, steps)
    assert found.dtype == steps.dtype


def test_an_array_that_is_a_view_arrives_in_its_own_order():
    z = np.arange(12, dtype=np.float32).reshape(3, 4).T
    np.testing.assert_array_equal(decode(encode({"z": z}, precision="fp32"), **LIMITS)[0]["z"], z)


@pytest.mark.parametrize(
    ("arrays", "options", "words"),
    [
        ({"z.scale": np.zeros(1, np.float32)}, {}, "the codec's own"),
        ({"z": np.array(["text"])}, {}, "does not travel"),
        ({"z": np.array([None])}, {}, "does not travel"),
        ({"z": np.zeros(1, complex)}, {}, "does not travel"),
        ({"z": np.array([np.nan], np.float32)}, {"precision": "int8"}, "NaN"),
        ({"z": np.array([np.inf], np.float32)}, {"precision": "int8"}, "NaN"),
        ({"z": np.zeros(1, np.float32)}, {"precision": "int4"}, "no precision"),
    ],
)
def test_what_cannot_be_encoded_is_refused(arrays, options, words):
    with pytest.raises(CodecError, match=words):
        encode(arrays, **options)


Z = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DATA = np.ones(2, np.float32).tobytes()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 1000) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"\xff\xff",
        struct.pack("<Q", 60_000) + b"[" * 60_000,
        pickle.dumps({"z": 1}),
        file_of({"z": Z}, DATA[:-1]),
        file_of({"z": Z}, DATA + b"\0"),
        file_of({"z": {**Z, "dtype": "F64", "data_offsets": [0, 16]}}, DATA * 2),
        file_of({"z": {**Z, "dtype": "BF16", "data_offsets": [0, 4]}}, DATA[:4]),
        file_of({"z": {**Z, "dtype": 7}}, DATA),
        file_of({"z": {**Z, "shape": [-2]}}, DATA),
        file_of({"z": {**Z, "shape": [2.0]}}, DATA),
        file_of({"z": {**Z, "shape": [True, 2]}}, DATA),
        file_of({"z": {**Z, "shape": "2"}}, DATA),
        file_of({"z": {**Z, "shape": [0, 2**70], "data_offsets": [0, 0]}}),
        file_of({"z": {**Z, "shape": [1] * 8 + [2]}}, DATA),
        file_of({"z": {**Z, "data_offsets": [8, 16]}}, DATA),
        file_of({"z": {**Z, "data_offsets": [0]}}, DATA),
        file_of({"z": {"dtype": "F32", "shape": [2]}}, DATA),
        file_of({"z": None}, DATA),
        file_of({"z": Z, "__metadata__": {"n": 1}}, DATA),
        file_of({"z": Z, "__metadata__": "text"}, DATA),
        file_of({"a": Z, "b": Z}, DATA),
        struct.pack("<Q", 131) + json.dumps({"z": Z}).encode()[:-1] + b", " + json.dumps({"z": Z}).encode()[1:] + DATA,
        file_of({f"z{i}": {**Z, "shape": [0], "data_offsets": [0, 0]} for i in range(codec.MAX_TENSORS + 1)}),
    ],
)
def test_a_malformed_body_is_refused(body):
    with pytest.raises(CodecError):
        decode(body, **LIMITS)


def test_the_body_of_the_last_test_is_taken_when_it_is_whole():
    np.testing.assert_array_equal(decode(file_of({"z": Z}, DATA), **LIMITS)[0]["z"], [1, 1])


@pytest.mark.parametrize("n", range(0, 80, 7))
def test_a_truncated_body_is_refused(n):
    body = encode({"z": np.ones(4, np.float32)}, precision="int8")
    with pytest.raises(CodecError):
        decode(body[: len(body) - 1 - n], **LIMITS)


def test_more_bytes_or_numbers_than_allowed_are_refused():
    body = encode({"z": np.zeros(100, np.float32), "y": np.zeros(100, np.int8)})
    decode(body, max_bytes=len(body), max_values=200)
    with pytest.raises(CodecError, match="bytes"):
        decode(body, max_bytes=len(body) - 1, max_values=200)
    with pytest.raises(CodecError, match="numbers"):
        decode(body, max_bytes=len(body), max_values=199)


def test_the_limit_of_numbers_is_checked_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(codec, "deserialize", lambda body: pytest.fail("it was unpacked"))
    with pytest.raises(CodecError, match="numbers"):
        decode(save({"z": np.zeros(2**17, np.uint8)}), **LIMITS)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused_on_request(precision, value):
    body = encode({"z": np.array([1.0, value], np.float32)}, precision=precision)
    assert not np.isfinite(decode(body, **LIMITS)[0]["z"]).all()
    with pytest.raises(CodecError, match="NaN"):
        decode(body, **LIMITS, finite=True)


def quantised(**changes: np.ndarray) -> dict[str, np.ndarray]:
    scale = np.ones((2, 1), np.float32)
    return {"z": np.ones((2, 3), np.uint8), "z.scale": scale, "z.zero": scale} | changes


def test_a_scale_that_is_hostile_makes_a_number_that_is_not_finite():
    body = save(quantised(**{"z.scale": np.full((2, 1), np.inf, np.float32)}))
    with pytest.raises(CodecError, match="NaN"):
        decode(body, **LIMITS, finite=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"z.scale": np.ones((3, 1), np.float32)},
        {"z.scale": np.ones((2, 1), np.int32)},
        {"z": np.ones((2, 3), np.int32)},
        {"z": np.ones((1, 3), np.uint8)},
        {"z.zero": np.ones(2, np.float32)},
    ],
)
def test_a_quantised_tensor_must_fit_its_scale(changes):
    decode(save(quantised()), **LIMITS)
    with pytest.raises(CodecError, match="quantised"):
        decode(save(quantised(**changes)), **LIMITS)


@pytest.mark.parametrize("missing", ["z", "z.scale", "z.zero"])
def test_a_quantised_tensor_comes_whole_or_not_at_all(missing):
    arrays = quantised()
    del arrays[missing]
    with pytest.raises(CodecError, match="quantised"):
        decode(save(arrays), **LIMITS)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 200))
def test_bytes_at_random_are_refused_or_read_and_nothing_else(junk, at):
    body = encode({"z": np.ones(8, np.float32)}, precision="int8", metadata={"a": "b"})
    for hostile in (junk, body[:at] + junk + body[at + len(junk) :]):
        try:
            decode(hostile, **LIMITS)
        except CodecError:
            continue


@given(st.binary(max_size=2000))
def test_zstd_gives_back_what_it_was_given(body):
    for encoding in ("identity", "zstd"):
        assert decompress(compress(body, encoding), encoding, max_bytes=2000) == body


def test_a_bomb_is_refused_unopened():
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(200 << 20))
    assert len(bomb) < 1 << 15
    with pytest.raises(CodecError, match="unpacks to 209,715,200 bytes"):
        decompress(bomb, "zstd", max_bytes=1 << 20)


def test_a_bomb_that_states_no_size_is_refused_unopened():
    packer = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    bomb = packer.compress(bytes(50 << 20)) + packer.flush()
    with pytest.raises(CodecError, match="does not state its size"):
        decompress(bomb, "zstd", max_bytes=1 << 20)


def test_a_bomb_that_lies_about_its_size_is_refused():
    lie = zstandard.ZstdCompressor().compress(bytes(300))
    honest = zstandard.ZstdCompressor().compress(bytes(1 << 20))
    assert zstandard.frame_content_size(lie) == 300
    with pytest.raises(CodecError):
        decompress(
            lie[: zstandard.frame_header_size(lie)] + honest[zstandard.frame_header_size(honest) :],
            "zstd",
            max_bytes=1000,
        )


@pytest.mark.parametrize("change", [lambda b: b[:-3], lambda b: b + b"x", lambda b: b"junk" + b, lambda b: b + b])
def test_a_frame_that_is_cut_or_followed_by_something_is_refused(change):
    with pytest.raises(CodecError):
        decompress(change(compress(b"feature" * 100, "zstd")), "zstd", max_bytes=10_000)


def test_unknown_encodings_and_large_bodies_are_refused():
    for encoding in ("gzip", "br", "zstd, zstd"):
        with pytest.raises(CodecError, match="content encoding"):
            decompress(b"x", encoding, max_bytes=10)
    with pytest.raises(CodecError, match="bytes"):
        decompress(b"x" * 11, "identity", max_bytes=10)


S = codec.MEDIA_TYPE


@pytest.mark.parametrize(
    ("accept", "accept_encoding", "answer"),
    [
        ("", "", ("fp16", "identity")),
        ("*/*", "gzip, deflate, br, zstd", ("fp16", "zstd")),
        (S, "*", ("fp16", "zstd")),
        (f"{S};precision=int8", "zstd;q=0", ("int8", "identity")),
        (f"{S}; Precision=FP32", "zstd;q=0.5", ("fp32", "zstd")),
        (f'{S};precision="int8", */*', "identity", ("int8", "identity")),
        (f"{S};precision=int8;q=0.5, {S};precision=fp32", "", ("fp32", "identity")),
        (f"{S};precision=int4, {S};precision=fp32;q=0.1", "", ("fp32", "identity")),
        ("text/html, application/*;q=0.1", "", ("fp16", "identity")),
    ],
)
def test_precision_and_encoding_are_what_the_client_asked_for(accept, accept_encoding, answer):
    assert negotiate(accept, accept_encoding) == answer


@pytest.mark.parametrize("accept", ["application/json", f"{S};precision=int4", f"{S};q=0", f"{S};q=much", "*/*;q=2"])
def test_a_client_that_accepts_nothing_that_is_here_is_told_what_is(accept):
    with pytest.raises(CodecError, match="fp16, fp32, int8"):
        negotiate(accept, "")


def test_the_media_type_asks_for_what_it_names():
    for precision in codec.PRECISIONS:
        assert negotiate(codec.media_type(precision), "")[0] == precision


def test_the_codec_needs_nothing_that_an_edge_device_does_not_have():
    tree = ast.parse(Path(codec.__file__).read_text(), feature_version=(3, 9))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    others = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert others == {"numpy", "safetensors", "zstandard"}
