"""The Gated DeltaNet layer equals transformers' one, however a sequence is cut into steps, whichever slots it has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet

from nanodeploy.models.checkpoint import destinations
from nanodeploy.models.layers.gated_delta_net import DeltaDims, GatedDeltaNet
from nanodeploy.ops.gated_delta_rule import StateRows

DIM, EPS = 40, 1e-6
SHAPES = {
    "2/4": DeltaDims(2, 4, 16, 16, 4),
    "1/3, wide values": DeltaDims(1, 3, 16, 32, 4),
    "2/2": DeltaDims(2, 2, 32, 16, 4),
}
NUM_SLOTS = 6


def pair(dims: DeltaDims):
    """transformers' layer and ours, with the same weights, fp32 on the CPU."""
    torch.manual_seed(0)
    config = Qwen3_5MoeTextConfig(
        hidden_size=DIM,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=dims.num_key_heads,
        linear_num_value_heads=dims.num_heads,
        linear_key_head_dim=dims.key_dim,
        linear_value_head_dim=dims.value_dim,
        linear_conv_kernel_dim=dims.width,
        rms_norm_eps=EPS,
    )
    theirs = Qwen3_5MoeGatedDeltaNet(config, 0).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ours = GatedDeltaNet(DIM, dims, EPS)
    places = destinations(ours)
    tensors = dict(theirs.named_parameters())
    assert places.keys() == tensors.keys()
    for name, place in places.items():
        place.copy_(tensors[name].detach().view_as(place))
    return theirs, ours


class Steps:
    """Runs our layer as an engine would: slots of anybody's garbage, buffers too long, padding."""

    def __init__(self, layer: GatedDeltaNet):
        self.layer = layer
        self.slots = layer.cache_need().layout(torch.float32).empty(NUM_SLOTS, torch.device("cpu"))
        for tensor in self.slots:
            tensor.fill_(float("nan"))
        self.known: set[int] = set()

    def step(self, decodes: dict[int, torch.Tensor], chunks: dict[int, torch.Tensor], padding: int = 0):
        """x of each slot's sequence, [1, D] of decodes and [n, D] of chunks -> what comes out, by slot."""
        work = {**decodes, **chunks}
        x = torch.cat([*work.values(), torch.full((padding, DIM), 7.0)])
        ends = torch.tensor([len(decodes), *(len(part) for part in chunks.values())]).cumsum(0).int()
        read = {slot: slot if slot in self.known else -1 for slot in work}
        writes = torch.full((len(x) + 3,), -1, dtype=torch.int32)
        for slot, end in zip(chunks, ends[1:].tolist()):
            if len(chunks[slot]):
                writes[end - 1] = slot

        def long(values) -> torch.Tensor:
            return torch.tensor([*values, -1, -1], dtype=torch.int32)

        rows = StateRows(
            decode_read=long(read[slot] for slot in decodes),
            decode_write=long(decodes),
            chunk_read=long(read[slot] for slot in chunks),
            chunk_write=writes,
            cu_q_lens=torch.cat((ends, ends[-1:].expand(2))),
            counts=torch.tensor([len(decodes), len(chunks), 0], dtype=torch.int32),
        )
        out = self.layer(x, x, rows, self.slots)
        assert not out[ends[-1] :].any()
        self.known |= {slot for slot, part in work.items() if len(part)}
        return dict(zip(work, out[: len(x) - padding].split([len(part) for part in work.values()])))


def near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (got - wanted).norm() <= 2e-5 * wanted.norm()


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=15)
@given(data=st.data())
def test_it_is_transformers_layer_in_any_steps(name, data):
    theirs, ours = pair(SHAPES[name])
    steps = Steps(ours)
    lengths = data.draw(st.lists(st.one_of(st.integers(1, 12), st.integers(60, 70)), min_size=1, max_size=3))
    x = [torch.randn(n, DIM, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(lengths)]
    slots = data.draw(st.permutations(range(NUM_SLOTS)))[: len(x)]
    done, got = [0] * len(x), [[] for _ in x]
    while any(n < len(part) for n, part in zip(done, x)):
        decodes, chunks = {}, {}
        for i, part in enumerate(x):
            left = len(part) - done[i]
            if left == 0:
                continue
            count = data.draw(st.sampled_from([1, left, min(left, 64), max(1, left // 2)]))
            into = decodes if count == 1 and done[i] and data.draw(st.booleans()) else chunks
            into[slots[i]] = part[done[i] : done[i] + count]
            done[i] += count
        for slot, out in steps.step(decodes, chunks, data.draw(st.integers(0, 2))).items():
            got[slots.index(slot)].append(out)
    with torch.no_grad():
        for part, pieces in zip(x, got):
            near(torch.cat(pieces), theirs(part[None])[0])


def test_a_row_of_decodes_that_is_padding_leaves_a_chunk_alone():
    """A step captured for two decodes runs one: the second row is the first of the chunk."""
    theirs, ours = pair(SHAPES["2/4"])
    steps = Steps(ours)
    x = torch.randn(9, DIM)
    slots = torch.tensor([1, -1], dtype=torch.int32)
    writes = torch.full((9,), -1, dtype=torch.int32)
    writes[8] = 2
    fresh = torch.tensor([-1, -1], dtype=torch.int32)
    bounds, counts = torch.tensor([1, 9], dtype=torch.int32), torch.tensor([2, 1, 0], dtype=torch.int32)
    out = ours(x, x, StateRows(fresh, slots, fresh, writes, bounds, counts), steps.slots)
    with torch.no_grad():
        near(out[:1], theirs(x[None, :1])[0])
        near(out[1:], theirs(x[None, 1:])[0])
    assert torch.isfinite(steps.slots.states[[1, 2]]).all() and steps.slots.states[[0, 3, 4, 5]].isnan().all()


def test_it_compiles_whole():
    _, ours = pair(SHAPES["2/4"])
    steps, compiled = Steps(ours), Steps(torch.compile(ours, backend="eager", fullgraph=True))
    x = torch.randn(5, DIM)
    for number in range(2):
        chunks = {3: x + number}
        near(compiled.step({}, chunks)[3], steps.step({}, chunks)[3])
