"""Published figures as cases: what the planner says of other people's rings on machines that we do not have.

Each case states what was published, where, what was assumed, and how near the prediction comes. The kernels' paces are
fitted to single-device figures of the same publication, never to the figure that is predicted.
"""

from __future__ import annotations

import pytest

from seqpar_ring.config import Settings
from seqpar_ring.geometry import Mask
from seqpar_ring.planner.cost import TOUCHED, Ring
from seqpar_ring.planner.hardware import BACKWARD, Attention, Device, Link, Machine, Pace
from seqpar_ring.planner.limits import overlap_tokens
from seqpar_ring.schedule import Row

TOUCHED_BY_PEERS = 6
"""Numbers of fp32 that ring-flash-attn and TransformerEngine touch for each one they merge: the partial result is
cast from bf16 (1.5), then one fused update reads it and the sum and writes (3), and the half that changed is copied
back (2 for half of the steps and more). Our merge is one pass in place, `TOUCHED`."""


def machine(forward: Pace, backward: Pace, link: float, touched: int) -> Machine:
    """Eight devices with 2.7 TB/s of attained memory bandwidth and these links, in bytes per second."""
    device = Device(
        name="eight of a kind",
        source="see the case",
        peak=989e12,
        matmul=690e12,
        attention={"bf16": Attention(forward=forward, backward=backward)},
        memory=80e9,
        bandwidth=2.7e12 * TOUCHED / touched,
    )
    joined = Link(name="NVLink", source="see the case", bandwidth=link, latency=8e-6)
    return Machine(device=device, inner=joined, outer=joined)


def ring(on: Machine, row: Row, tokens: int, **settings: object) -> Ring:
    return Ring((tokens,), Mask(), Settings.parse({"size": 8, **settings}), row, (on, "bf16"))


class TestRingFlashAttention:
    """README of zhuzilin/ring-flash-attention, batch API: 8 x H800, 8,192 tokens a rank, 32:8 heads of 128, causal.

    One H800 runs 8,192 tokens at 591.5 forwards a second, 154.7 with backward; zigzag reaches 85.2% and 90.2% of an
    eighth of that. FlashAttention-2's paces: 346 and 306 TFLOP/s, half of it at 260 keys, which make those two
    figures and its published 335 at 16k causal. H800: NVLink of 200 GB/s a direction, of which 0.8 are attained.
    """

    FORWARD, BACKWARD = Pace(rate=346e12, call=15e-6, row=260), Pace(rate=306e12, call=30e-6, row=260)
    ROW = Row(32, 8, 128, 128, 2)

    def alone(self) -> tuple[float, float]:
        """Seconds of forward and backward of 8,192 tokens on one device."""
        flop = 4 * 128 * 32
        forward, backward = (
            pace.call + passes * flop * (8192 * 8193 / 2 + pace.row * 8192) / pace.rate
            for pace, passes in ((self.FORWARD, 1.0), (self.BACKWARD, BACKWARD))
        )
        return forward, backward

    def test_the_paces_make_the_single_device(self) -> None:
        forward, backward = self.alone()
        assert 1 / forward == pytest.approx(591.5, rel=0.01)
        assert 1 / (forward + backward) == pytest.approx(154.7, rel=0.01)

    def test_zigzag_is_as_efficient_as_published_to_three_percent(self) -> None:
        forward, backward = self.alone()
        found = ring(machine(self.FORWARD, self.BACKWARD, 160e9, TOUCHED_BY_PEERS), self.ROW, 65536)
        assert 8 * forward / found.forward.seconds == pytest.approx(0.852, rel=0.03)
        both = found.forward.seconds + found.backward.seconds
        assert 8 * (forward + backward) / both == pytest.approx(0.902, rel=0.03)

    def test_a_contiguous_ring_is_as_slow_as_published_to_ten_percent(self) -> None:
        """52.1% forward and 53.9% with backward, whose rings compute every block that is not wholly masked."""
        forward, backward = self.alone()
        on = machine(self.FORWARD, self.BACKWARD, 160e9, TOUCHED_BY_PEERS)
        found = ring(on, self.ROW, 65536, layout="contiguous")
        assert 8 * forward / found.forward.seconds == pytest.approx(0.521, rel=0.10)
        both = found.forward.seconds + found.backward.seconds
        assert 8 * (forward + backward) / both == pytest.approx(0.539, rel=0.10)


class TestRingAttentionsTable:
    """Ring Attention, arXiv 2310.01889, table 2: the least block that hides a hop, in thousands of tokens, and six such
    blocks, the least sequence. FLOP/s and bytes/s are the paper's; full attention, as many key heads as query heads."""

    @pytest.mark.parametrize(
        ("peak", "link", "block"),
        [
            pytest.param(312e12, 300e9, 1.0, id="A100 NVLink"),
            pytest.param(312e12, 12.5e9, 24.5, id="A100 InfiniBand"),
            pytest.param(123e12, 112e9, 1.1, id="TPU v3"),
            pytest.param(275e12, 268e9, 1.0, id="TPU v4"),
            pytest.param(196e12, 186e9, 1.1, id="TPU v5e"),
        ],
    )
    def test_the_least_block_is_that_of_the_table_to_five_percent(self, peak: float, link: float, block: float) -> None:
        paces = Attention(forward=Pace(rate=peak), backward=Pace(rate=peak))
        joined = Link(name="l", source="the paper", bandwidth=link)
        enough = overlap_tokens(Row(32, 32, 128, 128, 2), paces, joined, 8, causal=False)
        assert enough.forward / 1000 == pytest.approx(block, rel=0.05)


class TestMagiAttentionsChart:
    """MagiAttention's chart of TransformerEngine's ring: 8 x H100, 8,192 tokens a rank, 64:8 heads of 128, causal:
    423 TFLOP/s a device forward, 434 backward. Kernels: cuDNN's 577 and 500, half of it at 200 and 320 keys (figures
    of the same chart, full 16k). NVLink: 360 GB/s attained."""

    def test_the_ring_of_transformer_engine_is_predicted_to_five_percent(self) -> None:
        paces = Pace(rate=577e12, call=15e-6, row=200), Pace(rate=500e12, call=30e-6, row=320)
        found = ring(machine(*paces, 360e9, TOUCHED_BY_PEERS), Row(64, 8, 128, 128, 2), 65536)
        flop = 4 * 128 * 64 * 65536 * 65537 / 2 / 8
        assert flop / found.forward.seconds / 1e12 == pytest.approx(423, rel=0.05)
        assert BACKWARD * flop / found.backward.seconds / 1e12 == pytest.approx(434, rel=0.05)


def test_zigzag_causal_needs_twice_f_over_g_b_tokens() -> None:
    """S >= 2 F / (g B): Llama 3 8B (g = 4) at 600 TFLOP/s over 50 GB/s needs 6,000 tokens a rank; over NVLink 667."""
    paces = Attention(forward=Pace(rate=600e12), backward=Pace(rate=500e12))
    for bandwidth, forward, backward in ((50e9, 6000, 6000), (450e9, 667, 667)):
        joined = Link(name="l", source="s", bandwidth=bandwidth)
        enough = overlap_tokens(Row(32, 8, 128, 128, 2), paces, joined, 8)
        assert enough.forward == pytest.approx(forward, rel=0.001)
        assert enough.backward == pytest.approx(backward, rel=0.001)


def test_the_simulation_agrees_with_the_formula_on_where_transfers_stop_hiding() -> None:
    """A zigzag sends 0.75 of the rows on average: at the formula's tokens little shows, at a quarter most of it."""
    paces = Pace(rate=600e12), Pace(rate=500e12)
    on = machine(*paces, 50e9, TOUCHED)
    row = Row(32, 8, 128, 128, 2)
    enough = overlap_tokens(row, on.device.paces("bf16"), on.inner, 8).both
    plenty, few = (ring(on, row, round(8 * factor * enough)) for factor in (1.1, 0.25))
    assert plenty.forward.exposed / plenty.forward.seconds < 0.05
    assert few.forward.exposed / few.forward.seconds > 0.5


@pytest.mark.parametrize(("pace", "fault"), [("forward", 2.0), ("backward", 0.5)])
def test_a_pace_that_is_wrong_would_show(pace: str, fault: float) -> None:
    case = TestRingFlashAttention()
    paces = {"forward": case.FORWARD, "backward": case.BACKWARD}
    paces[pace] = paces[pace].model_copy(update={"rate": paces[pace].rate * fault})
    forward, backward = case.alone()
    found = ring(machine(paces["forward"], paces["backward"], 160e9, TOUCHED_BY_PEERS), case.ROW, 65536)
    both = found.forward.seconds + found.backward.seconds
    assert 8 * (forward + backward) / both != pytest.approx(0.902, rel=0.03)
