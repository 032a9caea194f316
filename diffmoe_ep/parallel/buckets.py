"""Into what pieces DeepSpeed cuts parameters and gradients, in elements: the engine sets the first, all are planned."""

REDUCE_BUCKET = 50_000_000  # gradients that ZeRO 1 and 2 reduce at a time
STAGE_0_BUCKET = 500_000_000  # gradients that DeepSpeed flattens at a time without ZeRO
LARGEST_EXPERT_GROUP = 178_956_971  # a flat group of experts; DeepSpeed begins another one beyond
