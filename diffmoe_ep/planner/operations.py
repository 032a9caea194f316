"""The operations of a model's forward on one rank: the one list from which FLOPs, time and activation memory follow.

Legend: B samples, S tokens of them (T of each), M places of a caption, D hidden size, F width of an expert, N experts
(E of them on this rank), R rows that this rank's experts get, A (token, expert) pairs of its tokens, H heads, c bytes
of the compute type.

An operation is what the code starts today, fused or not; when a block's code changes, its line here changes with it.
What the experts' kernels save, `moe.kernels.saved` says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from diffmoe_ep.config import ModelConfig, has_predictor, num_tokens
from diffmoe_ep.model.count import expert_width
from diffmoe_ep.model.dit import is_moe
from diffmoe_ep.moe.experts import Kernel
from diffmoe_ep.moe.kernels.saved import saved_elements

FLOAT = 4  # bytes
LONG = 8

Module = Literal[
    "FFN", "experts", "shared experts", "attention", "cross-attention", "adaLN", "router", "predictor", "other"
]  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """One operation of a forward."""

    name: str
    module: Module  # the kind of module that it belongs to
    flops: float = 0  # of matmuls, 2 for each multiply-add
    moved: float = 0  # bytes read and written
    calls: int = 0  # kernels started
    gelu: float = 0  # elements that go through GELU
    saved: int = 0  # bytes that autograd keeps of its inputs and outputs, if no operation before it keeps them


@dataclass(frozen=True)
class Load:
    """What one rank's forward of a micro-step works on, and how."""

    samples: int  # B
    pairs: float  # A
    rows: float  # R
    experts: int  # E
    bf16: bool = True  # compute type, by autocast; float32 otherwise
    device: Literal["cuda", "cpu"] = "cuda"
    kernel: Kernel = "batched"  # of the experts; not auto

    @property
    def dtype(self) -> torch.dtype:
        """The compute type."""
        return torch.bfloat16 if self.bf16 else torch.float32


@dataclass(frozen=True)
class Operations:
    """A forward: what comes before the blocks, the halves of the blocks, what comes after them."""

    before: tuple[Operation, ...]
    attention: tuple[Operation, ...]  # a block's first half
    dense: tuple[Operation, ...]  # its feed-forward half where it is dense
    moe: tuple[Operation, ...]  # and where it is MoE
    after: tuple[Operation, ...]
    blocks: tuple[bool, ...]  # whether each block is MoE
    input: int  # bytes of the tokens that a block or half gets: what is saved of one that is computed again
    choice: int  # and bytes of an MoE layer's choice, which is saved too

    def counted(self) -> list[tuple[int, tuple[Operation, ...]]]:
        """Each list with how many times it runs in a forward."""
        moe = sum(self.blocks)
        halves = [(len(self.blocks), self.attention), (len(self.blocks) - moe, self.dense), (moe, self.moe)]
        return [(1, self.before), *halves, (1, self.after)]


def saved(operations: Sequence[Operation]) -> int:
    """Bytes that autograd keeps of some operations."""
    return sum(operation.saved for operation in operations)


def operations(model: ModelConfig, load: Load) -> Operations:
    """List a model's forward on one rank."""
    make = _Maker(model, load)
    blocks = tuple(is_moe(model, index) for index in range(model.num_blocks))
    halves = (make.attention(), make.dense(), make.moe())
    return Operations(make.before(), *halves, make.after(), blocks, make.whole, make.choice)


class _Maker:
    """The lists, in the order of the code: `embed`, `block` and `attention`, `moe.layer`, and the head."""

    def __init__(self, model: ModelConfig, load: Load) -> None:
        self.model, self.load, self.width = model, load, load.dtype.itemsize
        self.hidden, self.samples = model.hidden_size, load.samples
        self.tokens = load.samples * num_tokens(model)  # S
        self.places = load.samples * model.text_length if model.condition == "text" else 0  # B M
        self.pairs, self.rows = int(load.pairs), int(load.rows)  # for what is saved
        self.whole = self.tokens * self.hidden * self.width  # bytes of (S, D) in the compute type

    # -- kinds of operations -------------------------------------------------------------------------------------------

    def linear(
        self, module: Module, name: str, rows: float, ins: int, outs: int, weights: int = 1, saved: int = 0
    ) -> Operation:
        """A matmul of rows, in all, with each its own of `weights` weights."""
        moved = self.width * (rows * (ins + outs) + weights * ins * outs)
        return Operation(name, module, 2 * rows * ins * outs, moved, 1, saved=saved)

    def passes(
        self, module: Module, name: str, number: int, rows: float | None = None, columns: int | None = None,
        calls: int = 1, width: int | None = None, saved: int = 0,
    ) -> Operation:  # fmt: skip
        """Elementwise: `number` readings and writings of (rows, columns), by default of (S, D) in the compute type."""
        rows, columns = self.tokens if rows is None else rows, columns or self.hidden
        return Operation(name, module, moved=number * rows * columns * (width or self.width), calls=calls, saved=saved)

    def ffn(
        self, module: Module, rows: float, wide: int, inner: int, weights: int = 1, saved: int = 0
    ) -> list[Operation]:
        """Two linear maps with GELU between them; bytes saved of the input, and about GELU (inner)."""
        return [
            self.linear(module, "fc1", rows, self.hidden, wide, weights, saved),
            Operation("GELU", module, moved=2 * rows * wide * self.width, calls=1, gelu=rows * wide, saved=inner),
            self.linear(module, "fc2", rows, wide, self.hidden, weights),
        ]

    def norm(self, module: Module) -> Operation:
        """LayerNorm saves its input and two numbers of each token; CUDA's autocast normalizes in float32."""
        width = FLOAT if self.load.device == "cuda" else self.width
        return self.passes(module, "norm", 2, saved=(self.tokens * self.hidden + 2 * self.tokens) * width)

    def modulated(self, module: Module) -> list[Operation]:
        """Norm, scale and shift; saved are 1 + scale, the normed tokens and the modulated ones."""
        scales = self.samples * self.hidden * self.width
        return [self.norm(module), self.passes(module, "modulate", 4, calls=3, saved=scales + 2 * self.whole)]

    def gated(self, module: Module) -> list[Operation]:
        """Gate and residual; saved is what is gated."""
        return [self.passes(module, "gate", 2, saved=self.whole), self.passes(module, "residual", 3)]

    def mixing(self, module: Module, keys: int, all_keys: int, mask: int = 0) -> Operation:
        """Attention of every token over `keys` keys, `all_keys` over all samples; saved are query, key, value, the
        mixed values, a log-sum-exp for each head, and the mask.
        """
        flops = 4 * self.tokens * keys * self.hidden
        elements = (2 * self.tokens + 2 * all_keys) * self.hidden
        sums = self.tokens * self.model.num_heads * FLOAT
        return Operation("mix", module, flops, elements * self.width, 1, saved=elements * self.width + sums + mask)

    # -- the model -----------------------------------------------------------------------------------------------------

    def before(self) -> tuple[Operation, ...]:
        """Patches, time, and label or caption."""
        model, hidden, width, samples, places = self.model, self.hidden, self.width, self.samples, self.places
        patch, vectors = model.in_channels * model.patch**2, samples * hidden
        found = [
            self.linear("other", "patches", self.tokens, patch, hidden, saved=self.tokens * patch * width),
            self.linear("other", "time fc1", samples, 256, hidden, saved=samples * 256 * FLOAT),  # in float32 always
            self.passes("other", "time SiLU", 2, samples, width=FLOAT, saved=vectors * FLOAT),
            self.linear("other", "time fc2", samples, hidden, hidden, saved=vectors * FLOAT),
            self.passes("other", "condition", 3, samples, saved=vectors * (FLOAT + width)),  # before and after SiLU
        ]
        if model.condition == "class":
            return (*found, self.passes("other", "label", 2, samples, saved=samples * LONG))
        features, inner, masks = places * model.text_width, places * hidden, 2 * places + samples
        return (
            *found,
            self.linear("other", "caption fc1", places, model.text_width, hidden, saved=features * width),
            self.passes("other", "caption GELU", 2, places, saved=2 * inner * width),  # before and after
            self.linear("other", "caption fc2", places, hidden, hidden, saved=inner * width + masks),
        )

    def attention(self) -> tuple[Operation, ...]:
        """adaLN, attention, and where there are captions a look at them."""
        hidden, tokens, samples, places = self.hidden, self.tokens, self.samples, self.places
        found = [
            self.linear("adaLN", "modulation", samples, hidden, 6 * hidden, saved=samples * 6 * hidden * self.width),
            *self.modulated("attention"),
            self.linear("attention", "qkv", tokens, hidden, 3 * hidden),
            self.mixing("attention", num_tokens(self.model), tokens),
            self.linear("attention", "projection", tokens, hidden, hidden),
            *self.gated("attention"),
        ]
        if not places:
            return tuple(found)
        return (
            *found,
            self.norm("cross-attention"),
            self.linear("cross-attention", "query", tokens, hidden, hidden, saved=self.whole),
            self.linear("cross-attention", "key", places, hidden, hidden),
            self.linear("cross-attention", "value", places, hidden, hidden),
            self.mixing("cross-attention", self.model.text_length, places, mask=places * self.width),
            self.linear("cross-attention", "projection", tokens, hidden, hidden),
            self.passes("cross-attention", "residual", 3),
        )

    def dense(self) -> tuple[Operation, ...]:
        """A dense feed-forward network."""
        inner = 2 * self.tokens * 4 * self.hidden * self.width  # before and after GELU
        return (*self.modulated("FFN"), *self.ffn("FFN", self.tokens, 4 * self.hidden, inner), *self.gated("FFN"))

    def moe(self) -> tuple[Operation, ...]:
        """Router and predictor, dispatch, experts, combine."""
        predictor = self.predictor() if has_predictor(self.model) else []
        shared = self.shared_experts() if self.model.shared_experts else []
        inside = [*self.router(), *predictor, *self.experts(), *shared]
        return (*self.modulated("FFN"), *inside, *self.gated("FFN"))

    def router(self) -> list[Operation]:
        """Scores in float32, and the choice."""
        tokens, experts = self.tokens, self.model.num_experts
        wide, scores = tokens * self.hidden * FLOAT * self.load.bf16, tokens * experts * FLOAT
        return [
            self.passes("router", "input", 3, width=FLOAT, saved=wide),
            Operation("scores", "router", 2 * tokens * self.hidden * experts, calls=1),
            self.passes("router", "softmax, top-k", 20, columns=experts, calls=12, width=FLOAT, saved=scores),
        ]

    def predictor(self) -> list[Operation]:
        """The capacity predictor and its loss, which saves logits and targets."""
        tokens, experts = self.tokens, self.model.num_experts
        logits = tokens * experts * FLOAT
        return [
            self.linear("predictor", "fc1", tokens, self.hidden, self.hidden),
            self.passes("predictor", "SiLU", 2, saved=2 * self.whole),  # before and after
            self.linear("predictor", "fc2", tokens, self.hidden, experts),
            self.passes("predictor", "loss", 8, columns=experts, calls=6, width=FLOAT, saved=2 * logits),
        ]

    def experts(self) -> list[Operation]:
        """Rows to the experts, their networks, and the weighted sum of the answers."""
        load, wide = self.load, expert_width(self.model)
        inner = saved_elements(load.kernel, self.rows, wide, load.experts) * self.width
        received, answers = self.rows * self.hidden * self.width, self.pairs * self.hidden * self.width
        which = self.indices + self.pairs * FLOAT  # and their weights
        return [
            self.passes("experts", "permute", 2, load.pairs, saved=which),
            self.passes("experts", "rows by expert", 2, load.rows, calls=8, saved=self.order),
            *self.ffn("experts", load.rows, wide, inner, load.experts, received),
            self.passes("experts", "weigh", 4, load.pairs, width=FLOAT, saved=answers),
            self.passes("experts", "unpermute", 3, load.pairs, calls=2, width=FLOAT),
        ]

    def shared_experts(self) -> list[Operation]:
        """The experts that every token passes, as one network."""
        wide = self.model.shared_experts * expert_width(self.model)
        return self.ffn("shared experts", self.tokens, wide, 2 * self.tokens * wide * self.width)

    @property
    def indices(self) -> int:
        """Bytes that say which pairs there are."""
        return self.pairs * 3 * LONG + self.tokens * LONG

    @property
    def order(self) -> int:
        """Bytes of the order of received rows by expert and its inverse, if several ranks send to several experts."""
        return 2 * self.rows * LONG if 1 < self.load.experts < self.model.num_experts else 0

    @property
    def choice(self) -> int:
        """Bytes that an MoE layer saves of its choice when it is computed again."""
        return self.tokens * self.model.num_experts + self.indices + self.order  # a byte for each token and expert

    def after(self) -> tuple[Operation, ...]:
        """The head and the loss."""
        model, hidden, samples = self.model, self.hidden, self.samples
        pixels = samples * model.in_channels * model.input_size**2
        return (
            self.linear("other", "modulation", samples, hidden, 2 * hidden, saved=samples * 2 * hidden * self.width),
            *self.modulated("other"),
            self.linear("other", "head", self.tokens, hidden, model.patch**2 * model.out_channels),
            Operation("loss", "other", saved=pixels * FLOAT),  # the difference that it squares
        )
