"""RingCoreAttention by itself, as Megatron builds and calls it: groups of a micro-batch, masks, padding, refusals."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from mcore_models import HEADS, Case, Dense, batch_of, config_of, model_of, mpu, parallel, spec_of
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from seqpar_ring.integrations.megatron import RingCoreAttention, batch_on_this_rank, with_ring
from torch import Tensor

from seqpar_ring.compat import own_lanes
from seqpar_ring.errors import SeqparError
from seqpar_ring.groups import Groups
from seqpar_ring.testing import dense_attention, relative_error

G, D = 2, 8


def built(case: Case, how: Any = RingCoreAttention, **keywords: Any) -> Any:
    """As `Attention.__init__` builds it."""
    parallel(case.tp, case.cp)
    given = {
        "config": config_of(case, case.cp),
        "layer_number": 1,
        "attn_mask_type": AttnMaskType.causal,
        "attention_type": "self",
        "cp_comm_type": None,
        "softmax_scale": None,
        "pg_collection": ProcessGroupCollection.use_mpu_process_groups(),
    }
    # MLA goes through build_module, plain attention calls what the spec holds.
    make = functools.partial(build_module, how) if isinstance(how, ModuleSpec) else how
    return make(**{**given, **keywords})


def worst(case: Case, attention: Any, group: Any, mask_type: Any = None, **changes: Any) -> float:
    """How far output and gradients of q, k and v are from plain attention on whole sequences; NaN where not finite.

    Outputs have a gradient everywhere, padding among them.
    """
    params = batch_of(case)[1]
    made = torch.Generator().manual_seed(3)
    S, B = (int(params.cu_seqlens_q_padded[-1]), 1) if params is not None else (case.tokens, 2)
    whole = [torch.randn(B, S, heads, D, generator=made) for heads in (HEADS, G, G)]
    dout = torch.randn(B, S, HEADS * D, generator=made)
    params_here = changes.pop("params", params)
    grid = {"dout": dout, **dict(zip("qkv", whole, strict=True))}
    here = batch_on_this_rank(grid, group, params)
    results = []
    for tensors, run, brought in (
        (here, attention, params_here),
        (grid, Dense(config_of(case, 1), 1, attention._scale), params),
    ):
        qkv = [tensors[name].transpose(0, 1).clone().requires_grad_() for name in "qkv"]
        given = qkv if params is None else [x.squeeze(1) for x in qkv]
        out = run(
            *given,
            changes.get("attention_mask") if run is attention else None,
            attn_mask_type=mask_type or AttnMaskType.causal,
            attention_bias=None,
            packed_seq_params=brought,
        )
        out.backward(tensors["dout"].transpose(0, 1).reshape(out.shape))
        found = [x.transpose(0, 1) for x in (out.view(-1, B, HEADS * D), *(x.grad for x in qkv))]
        results.append(found)
    mine, truth = results
    cut = batch_on_this_rank({str(i): x.detach() for i, x in enumerate(truth)}, group, params)
    return max(relative_error(one, cut[str(i)]) for i, one in enumerate(mine))


def forms(_: Groups) -> list[float]:
    """Class, ModuleSpec and functools.partial."""
    case = Case()
    ways = (
        RingCoreAttention,
        ModuleSpec(module=RingCoreAttention, params={"settings": {"block_tokens": 5}}),
        functools.partial(RingCoreAttention, settings={"schedule": "direct"}),
    )
    made = [built(case, how) for how in ways]
    assert [one.settings.block_tokens for one in made] == ["auto", 5, "auto"]
    assert [one.settings.schedule for one in made] == ["ring", "ring", "direct"]
    return [worst(case, one, mpu.get_context_parallel_group()) for one in made]


def comm_types(_: Groups) -> list[tuple[str, int | None, float]]:
    """Every `cp_comm_type` that means something here, over four ranks in two nodes."""
    case, found = Case(cp=4), []
    parallel(1, 4)
    nodes = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    across = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    groups = ProcessGroupCollection.use_mpu_process_groups()
    for name in (None, "p2p", "all_gather", "seqpar_ring", "seqpar_ring:all_gather", "seqpar_ring:direct"):
        groups.hcp = None
        made = built(case, cp_comm_type=name, pg_collection=groups)
        found.append((made.settings.schedule, made.settings.node, worst(case, made, groups.cp)))
    for name in ("seqpar_ring", "seqpar_ring:double", "seqpar_ring:ring"):
        groups.hcp = [nodes[dist.get_rank() // 2], across[dist.get_rank() % 2]]
        made = built(case, cp_comm_type=name, pg_collection=groups)
        found.append((made.settings.schedule, made.settings.node, worst(case, made, groups.cp)))
    return found


def groups_of_micro_batches(_: Groups) -> list[float]:
    """One layer, five micro-batches: over four ranks, two, this one, four, and two with lanes of their own."""
    parallel(1, 4)
    rank = dist.get_rank()
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    single = [dist.new_group([one]) for one in range(4)]
    case = Case(cp=4, lengths=(21, 5, 31), padded=(24, 8, 32))
    layer, found = built(case), []
    for size, group in ((4, None), (2, pairs[rank // 2]), (1, None), (4, None), (2, pairs[rank // 2])):
        if len(found) == 4:
            own_lanes(pairs[rank // 2])
        params = batch_of(case)[1]
        params.local_cp_size, params.cp_group = (None, None) if size == 4 else (size, group)
        held = group or (mpu.get_context_parallel_group() if size == 4 else single[rank])
        found.append(worst(case, layer, held, params=params))
    return found


def padding(_: Groups) -> tuple[float, float, float]:
    """With a gradient at every output: what padding puts out, its gradients, and how far the rest is from dense."""
    case = Case(lengths=(21, 0, 5, 1, 31), padded=(24, 4, 8, 4, 32))
    layer, params = built(case), batch_of(case)[1]
    group = mpu.get_context_parallel_group()
    here = torch.cat([torch.arange(m) < n for n, m in zip(case.lengths, case.padded, strict=True)])[None]
    real = batch_on_this_rank({"real": here}, group, params)["real"][0]
    qkv = [torch.randn(len(real), heads, D, requires_grad=True) for heads in (HEADS, G, G)]
    out = layer(*qkv, None, attn_mask_type=AttnMaskType.causal, attention_bias=None, packed_seq_params=params)
    out.backward(torch.ones_like(out))
    outputs = out[~real].abs().max().item()
    gradients = max(x.grad[~real].abs().max().item() for x in qkv if x.grad is not None)
    assert 0 < int(real.sum()) < len(real)
    return outputs, gradients, worst(case, layer, group)


def plain_masks(_: Groups) -> list[float]:
    """A causal attention_mask, as Megatron's data pipeline makes it, and none."""
    case = Case()
    layer, group = built(case), mpu.get_context_parallel_group()
    whole = torch.ones(case.tokens, case.tokens, dtype=torch.bool).triu(1)[None, None]
    mask = batch_on_this_rank({"attention_mask": whole}, group)["attention_mask"]
    return [worst(case, layer, group, attention_mask=one) for one in (None, mask, mask)]


def without_counting_writes(_: Groups) -> list[float]:
    """Under torch.inference_mode: a causal mask, and lengths of documents; errors against dense, of the output."""
    found = []
    for case in (Case(), Case(lengths=(20, 28))):
        layer, group = built(case), mpu.get_context_parallel_group()
        with torch.inference_mode():
            params = batch_of(case)[1]
            whole = torch.ones(case.tokens, case.tokens, dtype=torch.bool).triu(1)[None, None]
            cut = {} if params is not None else {"attention_mask": whole}
            mask = batch_on_this_rank(cut, group)["attention_mask"] if cut else None
            q, k, v = (torch.randn(1, case.tokens, heads, D) for heads in (HEADS, G, G))
            q, k, v = (dist_same(x) for x in (q, k, v))
            mine = [batch_on_this_rank({"x": x}, group, params)["x"] for x in (q, k, v)]
            here = [x[0] if params is not None else x.transpose(0, 1) for x in mine]
            out = layer(*here, mask, packed_seq_params=params)
            lengths = case.lengths or (case.tokens,)
            dense = dense_attention(q, k, v, lengths)[0].flatten(2)
            expected = batch_on_this_rank({"x": dense}, group, params)["x"]
            found.append(relative_error(out.reshape(expected.shape), expected))
    return found


def dist_same(x: Tensor) -> Tensor:
    """That of the first rank, on all."""
    dist.broadcast(x, 0)
    return x


def full(_: Groups) -> float:
    """Without a causal mask: the mean over all keys of all ranks, where all scores are equal."""
    case = Case(lengths=(21, 5), padded=(24, 8))
    layer, params = built(case, attn_mask_type=AttnMaskType.padding), batch_of(case)[1]
    values = torch.randn(1, sum(case.padded), G, D, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros(1, sum(case.padded), G, D)
    expected[:, :21], expected[:, 24:29] = values[:, :21].mean(1, True), values[:, 24:29].mean(1, True)
    group = mpu.get_context_parallel_group()
    here = batch_on_this_rank({"v": values, "out": expected}, group, params)
    zeros = torch.zeros(here["v"].shape[1], HEADS, D)
    out = layer(zeros, zeros[:, :G], here["v"][0], None, packed_seq_params=params)
    return relative_error(out.view(-1, G, HEADS // G, D), here["out"][0][:, :, None].expand(-1, -1, HEADS // G, -1))


def specs(_: Groups) -> tuple[list[str], list[str], list[str]]:
    """What attends in the layers of a block's spec: before, with a ring, and in the first spec afterwards."""
    parallel(1, 2)
    block = get_gpt_decoder_block_spec(config_of(Case(), 2), use_transformer_engine=False)

    def names(spec: Any) -> list[str]:
        return [one.submodules.self_attention.submodules.core_attention.__name__ for one in spec.layer_specs]

    before = names(block)
    return before, names(with_ring(block)), names(block)


def saved(_: Groups, kind: str) -> dict[str, tuple[int, ...]]:
    """What a layer gives to a distributed checkpoint, with its shapes over all parts of the model."""
    layer = built(Case(cp=2, tp=2, options=(("softmax_type", kind),)))
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    return {key: x.global_shape for key, x in layer.sharded_state_dict("at.", (), {"dp_cp_group": group}).items()}


def warned(_: Groups, per_token: bool) -> list[str]:
    """What a model says when it is built over a ring."""
    case = Case(options=(("calculate_per_token_loss", per_token),))
    parallel(1, 2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model_of(case, config_of(case, 2))
    return [str(one.message) for one in said if "calculate_per_token_loss" in str(one.message)]


# ---------------------------------------------------------------------------------------------------- refusals


def refused(_: Groups, what: str) -> str:
    """The message of an error, with its class."""
    try:
        REFUSALS[what]()
    except SeqparError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def with_options(**options: Any) -> Callable[[], object]:
    """A layer whose config says this."""
    return lambda: built(Case(options=tuple(options.items())))


def changed(name: str, value: Any) -> Callable[[], object]:
    """A layer whose config says what its own checks would refuse, or what this version does not know."""

    def build() -> object:
        parallel(1, 2)
        config = config_of(Case(), 2)
        setattr(config, name, value)
        return built(Case(), config=config)

    return build


def call(case: Case | None = None, **keywords: Any) -> object:
    case = case or Case()
    layer = built(case)
    tokens, params = keywords.pop("tokens", case.tokens // 2), keywords.pop("params", None)
    shape: tuple[int, ...] = (tokens,) if params is not None else (tokens, 1)
    q, k = torch.randn(*shape, HEADS, D), torch.randn(*shape, G, D)
    k = keywords.pop("keys", k)
    return layer(q, k, k, keywords.pop("attention_mask", None), packed_seq_params=params, **keywords)


def lengths_of(real: tuple[int, ...], padded: tuple[int, ...], **changes: Any) -> Any:
    params = batch_of(Case(lengths=real, padded=padded))[1]
    for name, value in changes.items():
        setattr(params, name, value)
    return params


def ignored_lengths(qkv_format: str | None) -> Callable[[], object]:
    """Lengths that Megatron would not read: documents would see each other."""
    lengths = torch.tensor([0, 20, 48], dtype=torch.int32)
    params = PackedSeqParams(qkv_format=qkv_format, cu_seqlens_q=lengths, cu_seqlens_kv=lengths)

    def ask() -> object:
        layer = built(Case())
        q, k = torch.randn(24, 1, HEADS, D), torch.randn(24, 1, G, D)
        return layer(q, k, k, None, packed_seq_params=params)

    return ask


def another_size(size: int) -> object:
    """A layer of a config with this context_parallel_size, in groups of two."""
    parallel(1, 2)
    return built(Case(), config=config_of(Case(), size))


def with_other_attention() -> object:
    class Sparse:
        """No plain attention."""

    spec = spec_of(Case())
    spec.submodules.self_attention.submodules.core_attention = Sparse
    return with_ring(spec)


def masked(change: Callable[[Tensor], None]) -> object:
    mask = torch.ones(1, 1, 48, 48, dtype=torch.bool).triu(1)
    change(mask)
    parallel(1, 2)
    here = batch_on_this_rank({"attention_mask": mask}, mpu.get_context_parallel_group())["attention_mask"]
    return call(attention_mask=here)


REFUSALS: dict[str, Callable[[], object]] = {
    "lengths without a format": ignored_lengths(None),
    "lengths of a batch": ignored_lengths("sbhd"),
    "config without the group": lambda: another_size(1),
    "config with another group": lambda: another_size(4),
    "dropout": with_options(attention_dropout=0.1),
    "dropout of the layer": lambda: built(Case(), attention_dropout=0.2),
    "fp8 dot product": changed("fp8_dot_product_attention", True),
    "fp8 attention": changed("fp8_multi_head_attention", True),
    "qk clip": changed("qk_clip", True),
    "graphs": changed("cuda_graph_impl", "local"),
    "sinks": changed("softmax_type", "mystery"),
    "mask type": lambda: built(Case(), attn_mask_type=AttnMaskType.arbitrary),
    "cross": lambda: built(Case(), attention_type="cross"),
    "comm type": lambda: built(Case(), cp_comm_type="seqpar_rong"),
    "variant": lambda: built(Case(), cp_comm_type="seqpar_ring:triple"),
    "a2a": lambda: built(Case(), cp_comm_type="a2a+p2p"),
    "double without nodes": lambda: built(Case(), cp_comm_type="seqpar_ring:double"),
    "setting": lambda: with_ring(spec_of(Case()), blok_tokens=5),
    "setting of Megatron's": lambda: with_ring(spec_of(Case()), layout="striped"),
    "kernel": lambda: with_ring(spec_of(Case()), kernel="flash9"),
    "spec": lambda: with_ring(torch.nn.Linear),
    "other attention": with_other_attention,
    "bias": lambda: call(attention_bias=torch.zeros(1, HEADS, 24, 48)),
    "arbitrary mask": lambda: masked(lambda mask: mask[..., 30, 3].fill_(True)),
    "mask's shape": lambda: call(attention_mask=torch.zeros(1, 1, 48, 48, dtype=torch.bool)),
    "padding mask": lambda: call(attn_mask_type=AttnMaskType.padding),
    "mask of packed": lambda: call(
        params=lengths_of((24, 24), ()), attention_mask=torch.zeros(1, 1, 24, 48, dtype=torch.bool)
    ),
    "more arguments": lambda: call(qr=torch.zeros(1)),
    "cache": lambda: call(keys=torch.randn(30, 1, G, D)),
    "odd": lambda: call(tokens=23),
    "unpadded": lambda: call(params=lengths_of((23, 25), ())),
    "no room": lambda: call(params=lengths_of((24, 24), (20, 28))),
    "too few": lambda: call(params=lengths_of((20, 20), ())),
    "descending": lambda: call(params=lengths_of((24, 24), (), cu_seqlens_q=torch.tensor([0, 30, 24]))),
    "other keys": lambda: call(params=lengths_of((24, 24), (), cu_seqlens_kv=torch.tensor([0, 12, 48]))),
    "no group": lambda: call(params=lengths_of((24, 24), (), local_cp_size=2)),
}
"""By name what has no exact answer, or no meaning, here."""
