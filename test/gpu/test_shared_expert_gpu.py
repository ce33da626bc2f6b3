"""The shared expert on a stream of its own."""

import pytest
import torch

from nibble.layers.moe.shared_expert import SharedExpert

pytestmark = pytest.mark.gpu


def make_expert(streams: list[torch.cuda.Stream]) -> SharedExpert:
    weight = torch.randn(256, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(0))

    def feed_forward(x: torch.Tensor) -> torch.Tensor:
        streams.append(torch.cuda.current_stream())
        return x @ weight

    return SharedExpert(feed_forward, torch.device("cuda"))


def routed(x: torch.Tensor) -> torch.Tensor:
    return x.sin() * 2


def test_its_part_is_added_whatever_stream_computes_it():
    streams: list[torch.cuda.Stream] = []
    expert = make_expert(streams)
    x = torch.randn(64, 256, device="cuda")
    for _ in range(50):  # long enough for memory of one stream to be given to the other, if it ever is
        torch.testing.assert_close(expert.add_to(routed, x), routed(x) + expert.feed_forward(x))
        x = expert.add_to(routed, x).tanh()
    assert streams[0] != torch.cuda.current_stream()


def test_a_cuda_graph_captures_both_streams():
    expert = make_expert([])
    x = torch.zeros(64, 256, device="cuda")
    expert.add_to(routed, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = expert.add_to(routed, x)
    for seed in range(3):
        x.copy_(torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.testing.assert_close(out, routed(x) + expert.feed_forward(x))
