"""Which ranks there are and what is split over them."""

from dataclasses import dataclass

from nibble.config.model_config import ModelConfig
from nibble.config.server_args import ServerArgs
from nibble.utils.errors import ConfigError


@dataclass(frozen=True)
class ParallelConfig:
    """`tp_size` ranks make one replica: `dp_size` attention groups, experts over `ep_size` groups."""

    tp_size: int = 1
    dp_size: int = 1
    ep_size: int = 1
    enable_dp_attention: bool = False

    @property
    def world_size(self) -> int:
        return self.tp_size


def resolve_parallel(args: ServerArgs, model: ModelConfig) -> ParallelConfig:
    """Checks that the sizes fit together and the model. Raises ConfigError with the reason and the fix."""
    tp, dp, ep = args.tp_size, args.dp_size, args.ep_size
    if dp > 1 and not args.enable_dp_attention:
        raise ConfigError(f"--dp-size {dp} needs --enable-dp-attention")
    if tp > 1 and not args.enable_dp_attention:
        raise ConfigError(
            f"--tp-size {tp} without data-parallel attention is not supported; add --enable-dp-attention --dp-size {tp}"
        )
    if dp != tp:
        raise ConfigError(
            f"--dp-size {dp} must equal --tp-size {tp}: attention that is tensor-parallel inside a "
            f"data-parallel group is not supported; set --dp-size {tp}, or --tp-size {dp}"
        )
    if model.moe is None:
        if ep != 1:
            raise ConfigError(f"--ep-size {ep}: {model.architecture} has no experts to split; leave it out")
    elif ep != tp:
        raise ConfigError(
            f"--ep-size {ep} must equal --tp-size {tp}: experts split in width are not supported; set --ep-size {tp}"
        )
    elif model.moe.num_experts % ep:
        divisors = [size for size in range(1, model.moe.num_experts + 1) if model.moe.num_experts % size == 0]
        raise ConfigError(f"--ep-size {ep} must divide the {model.moe.num_experts} experts; possible sizes: {divisors}")
    return ParallelConfig(tp, dp, ep, args.enable_dp_attention)
