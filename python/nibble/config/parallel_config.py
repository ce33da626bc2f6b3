"""Which ranks there are and what is split over them."""

import dataclasses
from dataclasses import dataclass

from nibble.config.model_config import ModelConfig
from nibble.config.quantization_config import NVFP4_GROUP_SIZE, QuantizationConfig
from nibble.config.server_args import ServerArgs
from nibble.utils.errors import ConfigError


@dataclass(frozen=True)
class ParallelConfig:
    """`tp_size` ranks make one replica: `dp_size` attention groups, experts over `ep_size` groups.

    The ranks of a group follow each other. Those of an attention group share its requests and split the heads; those
    of an expert group hold the same experts and split their width. The ranks of a node follow each other, too, and an
    attention group lies on one node.
    """

    tp_size: int = 1
    dp_size: int = 1
    ep_size: int = 1
    enable_dp_attention: bool = False
    dp_lm_head: bool = True
    """lm_head is split over the ranks of an attention group; otherwise over all ranks, which then meet there."""
    groups_meet: bool = True
    """Attention groups exchange rows, in the experts or for lm_head; otherwise each runs for itself."""
    nnodes: int = 1

    @property
    def world_size(self) -> int:
        return self.tp_size

    @property
    def attn_tp_size(self) -> int:
        return self.tp_size // self.dp_size

    @property
    def moe_tp_size(self) -> int:
        return self.tp_size // self.ep_size

    @property
    def ranks_per_node(self) -> int:
        return self.tp_size // self.nnodes

    def ranks_of_node(self, node: int) -> range:
        return range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node)

    def node_of(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def index_on_node(self, rank: int) -> int:
        """Which of the equal shares of its host a rank gets: of GPUs, of cores."""
        return rank % self.ranks_per_node

    def rail(self, rank: int) -> range:
        """The ranks that have this one's place on each node."""
        return range(self.index_on_node(rank), self.world_size, self.ranks_per_node)

    def dp_rank(self, rank: int) -> int:
        return rank // self.attn_tp_size

    def first_rank(self, dp_rank: int) -> int:
        """The rank that receives the requests of an attention group and answers for it."""
        return dp_rank * self.attn_tp_size

    def attn_tp_ranks(self, rank: int) -> range:
        """The attention group of a rank."""
        first = self.first_rank(self.dp_rank(rank))
        return range(first, first + self.attn_tp_size)

    def share_of(self, model: ModelConfig) -> ModelConfig:
        """The model as one rank's attention sees it. Heads of keys and values are copied where there are too few."""
        return dataclasses.replace(
            model,
            num_heads=model.num_heads // self.attn_tp_size,
            num_kv_heads=max(1, model.num_kv_heads // self.attn_tp_size),
        )


def resolve_parallel(args: ServerArgs, model: ModelConfig, quantization: QuantizationConfig | None) -> ParallelConfig:
    """Checks that the sizes fit together and the model. Raises ConfigError with the reason and the fix."""
    tp, dp = args.tp_size, args.dp_size
    if dp > 1 and not args.enable_dp_attention:
        raise ConfigError(f"--dp-size {dp} needs --enable-dp-attention")
    if tp % dp:
        raise ConfigError(
            f"--dp-size {dp} must divide --tp-size {tp}, the ranks of all its attention groups; "
            f"possible sizes: {_divisors(tp)}"
        )
    if args.enable_dp_lm_head and not args.enable_dp_attention:
        raise ConfigError("--enable-dp-lm-head needs --enable-dp-attention")
    _check_nodes(args)
    unit = 1 if quantization is None else NVFP4_GROUP_SIZE
    _check_heads(tp // dp, model)
    _check_dense_layers(args, model, unit)
    _check_experts(args, model, unit)
    # The matrix of the embedding is split like the embedding, and groups of a dense model have no other reason to meet.
    dp_lm_head = args.enable_dp_lm_head or dp == 1 or model.tie_word_embeddings or model.moe is None
    return ParallelConfig(
        tp,
        dp,
        args.ep_size,
        args.enable_dp_attention,
        dp_lm_head,
        groups_meet=model.moe is not None,
        nnodes=args.nnodes,
    )


def _check_nodes(args: ServerArgs) -> None:
    """Nodes have equally many ranks and whole attention groups, hence equally many of those, too."""
    tp, dp, nnodes = args.tp_size, args.dp_size, args.nnodes
    if tp % nnodes:
        reason, way_out = f"must divide --tp-size {tp}, the ranks of all nodes", "or choose another --tp-size"
    elif dp % nnodes:
        reason = (
            f"must divide --dp-size {dp}, because an attention group (here of {tp // dp} ranks: --tp-size divided by "
            "--dp-size) lies on one node"
        )
        way_out = "or raise --dp-size"
    else:
        return
    raise ConfigError(f"--nnodes {nnodes} {reason}; possible: {_divisors(dp)}, {way_out}")


def _check_heads(attn_tp: int, model: ModelConfig) -> None:
    heads, kv_heads = model.num_heads, model.num_kv_heads
    possible = [size for size in _divisors(heads) if kv_heads % size == 0 or size % kv_heads == 0]
    if attn_tp not in possible:
        raise ConfigError(
            f"attention groups of {attn_tp} ranks (--tp-size divided by --dp-size) can't share {heads} heads and "
            f"{kv_heads} heads of keys and values; possible: {possible} ranks"
        )


def _check_dense_layers(args: ServerArgs, model: ModelConfig, unit: int) -> None:
    """`unit`: widths are cut at multiples of it."""
    ranks, moe = args.tp_size // args.dp_size, model.moe
    if args.moe_dense_tp_size is not None:
        if moe is None:
            raise ConfigError(f"--moe-dense-tp-size: {model.architecture} has no experts; leave it out")
        if args.moe_dense_tp_size != 1:
            raise ConfigError(
                f"--moe-dense-tp-size {args.moe_dense_tp_size} is not supported: dense layers are split over the "
                f"{ranks} ranks of an attention group, or with 1 not at all"
            )
        ranks = 1
    has_dense_layers = moe is None or not all(map(moe.is_moe_layer, range(model.num_layers)))
    widths = [model.intermediate_size] if has_dense_layers else []
    if moe is not None and moe.shared_intermediate_size:
        widths.append(moe.shared_intermediate_size)
    if ranks > 1 and any(ranks > width // unit for width in widths):
        way_out = "raise --dp-size" + (" or set --moe-dense-tp-size 1" if moe else "")
        raise ConfigError(
            f"dense layers of width {min(widths)}, cut at multiples of {unit}, can't be split over the "
            f"{ranks} ranks of an attention group (--tp-size divided by --dp-size); {way_out}"
        )


def _check_experts(args: ServerArgs, model: ModelConfig, unit: int) -> None:
    tp, ep, moe = args.tp_size, args.ep_size, model.moe
    if moe is None:
        if ep != 1:
            raise ConfigError(f"--ep-size {ep}: {model.architecture} has no experts to split; leave it out")
        return
    most_ranks = max(1, moe.intermediate_size // unit)  # that share an expert
    reason = None
    if tp % ep:
        reason = f"must divide --tp-size {tp}, the ranks of all expert groups"
    elif moe.num_experts % ep:
        reason = f"must divide the {moe.num_experts} experts"
    elif tp // ep > most_ranks:
        reason = (
            f"with --tp-size {tp} splits an expert of width {moe.intermediate_size} over {tp // ep} ranks, and it can "
            f"only be cut at multiples of {unit}"
        )
    if reason is not None:
        possible = [size for size in _divisors(tp) if moe.num_experts % size == 0 and tp // size <= most_ranks]
        advice = f"possible sizes: {possible}" if possible else "no size will do; choose another --tp-size"
        raise ConfigError(f"--ep-size {ep} {reason}; {advice}")


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
