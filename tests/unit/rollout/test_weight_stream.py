"""Buckets keep the stream complete and in order; a digest detects any change; packed bytes are a safetensors file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load

from align.rollout.sync.stream import buckets, combined_digest, digest, pack, packed_size


def stream(dtype: torch.dtype = torch.float32) -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(0)
    shapes = [(3, 5), (64, 33), (7,), (2048, 3), (), (40, 40)]
    return [(f"w{i}", torch.randn(shape).to(dtype)) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("size", [1, 100, 9000, 10**9])
def test_buckets_hold_the_stream_once_and_in_order(size):
    pairs = stream()
    bucketed = list(buckets(iter(pairs), size, torch.float32))
    flat = [pair for bucket in bucketed for pair in bucket]
    assert [name for name, _ in flat] == [name for name, _ in pairs]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(flat, pairs))
    for bucket in bucketed:
        assert len(bucket) == 1 or sum(t.numel() * 4 for _, t in bucket) <= size
    if size == 1:
        assert len(bucketed) == len(pairs)
    if size == 10**9:
        assert len(bucketed) == 1


def test_biases_of_routers_keep_their_precision():
    bias, weight = torch.tensor([15.0, 15.01]), torch.tensor([[15.0, 15.01]])
    names = ["model.layers.3.mlp.gate.e_score_correction_bias", "model.layers.3.mlp.expert_bias"]
    (bucket,) = buckets(iter([*((name, bias) for name in names), ("w", weight)]), 1000, torch.bfloat16)
    assert [tensor.tolist() for _, tensor in bucket[:2]] == [bias.tolist()] * 2
    assert bucket[2][1].dtype == torch.bfloat16
    buffer = torch.zeros(packed_size(bucket), dtype=torch.uint8)
    pack(bucket, buffer)
    assert torch.equal(load(buffer.numpy().tobytes())[names[1]], bias)


def test_only_one_bucket_is_drawn_at_a_time():
    """Tensors that the stream merges or gathers must not accumulate in memory."""
    drawn = []

    def lazily():
        for name, tensor in stream():
            drawn.append(name)
            yield name, tensor

    bucketed = buckets(lazily(), 9000, torch.float32)
    next(bucketed)
    assert drawn == ["w0", "w1", "w2", "w3"]  # three in the bucket, and one that does not fit into it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_bytes_are_a_safetensors_file(dtype):
    bucket = stream(dtype)
    buffer = torch.zeros(packed_size(bucket) + 100, dtype=torch.uint8)
    pack(bucket, buffer)
    read = load(buffer[: packed_size(bucket)].numpy().tobytes())
    assert set(read) == {name for name, _ in bucket}
    for name, tensor in bucket:
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (4096, 7), (1,), ()])
def test_a_digest_detects_every_single_change(dtype, shape):
    torch.manual_seed(0)
    tensor = torch.randn(shape).to(dtype)
    before = digest(tensor)
    assert before == digest(tensor.clone())
    places = torch.randperm(tensor.numel())[:50]
    for place in places:
        changed = tensor.clone()
        bits = changed.view(-1).view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
        bits[place] ^= 1
        assert digest(changed) != before


def test_a_digest_detects_moved_values_shapes_and_types():
    torch.manual_seed(0)
    tensor = torch.randn(64, 4096)
    before = digest(tensor)
    for first, second in [((0, 0), (0, 2)), ((0, 0), (5, 0)), ((1, 4095), (60, 2))]:
        moved = tensor.clone()
        moved[first], moved[second] = tensor[second], tensor[first]
        assert digest(moved) != before
    rows = tensor.clone()
    rows[[3, 9]] = tensor[[9, 3]]
    assert len({before, digest(rows), digest(tensor.T), digest(tensor.view(32, 8192)), digest(tensor.int())}) == 5


def test_a_digest_does_not_depend_on_the_memory_layout():
    """A view that has an offset or is not contiguous has the digest of its contiguous copy."""
    base = torch.randn(9, 31).to(torch.bfloat16)
    for view in (base[1], base[:, 3:5], base.T[2:7], base.view(-1)[3:11]):
        assert digest(view) == digest(view.clone().contiguous())


def test_the_combined_digest_depends_on_names_and_not_on_order():
    assert combined_digest({"a": "1", "b": "2"}) == combined_digest({"b": "2", "a": "1"})
    assert combined_digest({"a": "1", "b": "2"}) != combined_digest({"a": "2", "b": "1"})
