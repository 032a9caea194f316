"""The operations of a model's forward on one rank: the one list from which FLOPs, time and activation memory follow.

Legend: B samples, S tokens of them (T of each), M places of a caption, D hidden size, F width of an expert, N experts
(E of them on this rank), R rows that this rank's experts get, A (token, expert) pairs of its tokens, H heads, c bytes
of the compute type.

An operation is what the code starts today, fused or not; when a block's code changes, its line here changes with it.
What the experts' kernels save is asked of `moe.kernels`.
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
    def width(self) -> int:
        """Bytes of the compute type."""
        return 2 if self.bf16 else FLOAT


@dataclass(frozen=True)
class Operations:
    """A forward: what comes before the blocks, the halves of the blocks, what comes after them."""

    before: tuple[Operation, ...]
    attention: tuple[Operation, ...]  # a block's first half
    dense: tuple[Operation, ...]  # its feed-forward half where it is dense
    moe: tuple[Operation, ...]  # and where it is MoE
    after: tuple[Operation, ...]
    blocks: tuple[bool, ...]  # whether each block is MoE
    input: int  # bytes of the tokens that a block or half gets: what is kept of one that is computed again
    choice: int  # and bytes of an MoE layer's choice, which is kept too

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
        self.model, self.load, self.width = model, load, load.width
        self.hidden, self.samples = model.hidden_size, load.samples
        self.tokens = load.samples * num_tokens(model)  # S
        self.caption = load.samples * model.text_length if model.condition == "text" else 0  # B M
        self.whole = self.tokens * self.hidden * self.width  # bytes of (S, D) in the compute type

    # -- kinds of operations -------------------------------------------------------------------------------------------

    def linear(
        self, name: str, module: Module, rows: float, ins: int, outs: int, copies: int = 1, saved: int = 0
    ) -> Operation:
        """A matmul of rows with `copies` weights, rows in all."""
        moved = self.width * (rows * (ins + outs) + copies * ins * outs)
        return Operation(name, module, 2 * rows * ins * outs, moved, 1, saved=saved)

    def passes(
        self, name: str, module: Module, number: int, rows: float | None = None, columns: int | None = None,
        calls: int = 1, width: int | None = None, saved: int = 0,
    ) -> Operation:  # fmt: skip
        """Elementwise: `number` readings and writings of (rows, columns), by default of (S, D) in the compute type."""
        rows, columns = self.tokens if rows is None else rows, columns or self.hidden
        return Operation(name, module, moved=number * rows * columns * (width or self.width), calls=calls, saved=saved)

    def ffn(
        self, module: Module, rows: float, wide: int, between: int, copies: int = 1, saved: int = 0
    ) -> list[Operation]:
        """Two linear maps with GELU between them. saved: bytes of the input; between: bytes kept about GELU."""
        return [
            self.linear("fc1", module, rows, self.hidden, wide, copies, saved),
            Operation("GELU", module, moved=2 * rows * wide * self.width, calls=1, gelu=rows * wide, saved=between),
            self.linear("fc2", module, rows, wide, self.hidden, copies),
        ]

    def norm(self, module: Module) -> Operation:
        """LayerNorm keeps its input and two numbers of each token; CUDA's autocast normalises in float32."""
        width = FLOAT if self.load.device == "cuda" else self.width
        return self.passes("norm", module, 2, saved=(self.tokens * self.hidden + 2 * self.tokens) * width)

    def modulated(self, module: Module) -> list[Operation]:
        """Norm, scale and shift; kept are 1 + scale, the normed tokens and the modulated ones."""
        kept = self.samples * self.hidden * self.width + 2 * self.whole
        return [self.norm(module), self.passes("modulate", module, 4, calls=3, saved=kept)]

    def gated(self, module: Module) -> list[Operation]:
        """Gate and residual; kept is what is gated."""
        return [self.passes("gate", module, 2, saved=self.whole), self.passes("residual", module, 3)]

    def mixing(self, module: Module, places: int, others: int, mask: int = 0) -> Operation:
        """Attention of all tokens over `places` each, `others` keys in all; kept are query, key, value, the mixed
        values and a log-sum-exp for each head.
        """
        flops = 4 * self.tokens * places * self.hidden
        moved = self.width * (2 * self.tokens + 2 * others) * self.hidden
        kept = 2 * self.whole + 2 * others * self.hidden * self.width + self.tokens * self.model.num_heads * FLOAT
        return Operation("mix", module, flops, moved, 1, saved=kept + mask)

    # -- the model -----------------------------------------------------------------------------------------------------

    def before(self) -> tuple[Operation, ...]:
        """Patches, time, and label or caption."""
        model, hidden, width, samples = self.model, self.hidden, self.width, self.samples
        patch = model.in_channels * model.patch**2
        found = [
            self.linear("patches", "other", self.tokens, patch, hidden, saved=self.tokens * patch * width),
            self.linear("time fc1", "other", samples, 256, hidden, saved=samples * 256 * width),
            self.passes("time SiLU", "other", 2, samples, saved=samples * hidden * width),
            self.linear("time fc2", "other", samples, hidden, hidden, saved=samples * hidden * width),
            self.passes(
                "condition", "other", 3, samples, saved=samples * hidden * (FLOAT + width)
            ),  # before and after SiLU
        ]
        if model.condition == "class":
            return (*found, self.passes("label", "other", 2, samples, saved=samples * LONG))
        places, masks = self.caption, 2 * self.caption + samples
        return (
            *found,
            self.linear(
                "caption fc1", "other", places, model.text_width, hidden, saved=places * model.text_width * width
            ),
            self.passes("caption GELU", "other", 2, places, saved=2 * places * hidden * width),
            self.linear("caption fc2", "other", places, hidden, hidden, saved=places * hidden * width + masks),
        )

    def attention(self) -> tuple[Operation, ...]:
        """adaLN, attention, and where there are captions a look at them."""
        hidden, tokens, samples = self.hidden, self.tokens, self.samples
        found = [
            self.linear("modulation", "adaLN", samples, hidden, 6 * hidden, saved=samples * 6 * hidden * self.width),
            *self.modulated("attention"),
            self.linear("qkv", "attention", tokens, hidden, 3 * hidden),
            self.mixing("attention", num_tokens(self.model), tokens),
            self.linear("projection", "attention", tokens, hidden, hidden),
            *self.gated("attention"),
        ]
        if not self.caption:
            return tuple(found)
        return (
            *found,
            self.norm("cross-attention"),
            self.linear("query", "cross-attention", tokens, hidden, hidden, saved=self.whole),
            self.linear("key", "cross-attention", self.caption, hidden, hidden),
            self.linear("value", "cross-attention", self.caption, hidden, hidden),
            self.mixing("cross-attention", self.model.text_length, self.caption, mask=self.caption * self.width),
            self.linear("projection", "cross-attention", tokens, hidden, hidden),
            self.passes("residual", "cross-attention", 3),
        )

    def dense(self) -> tuple[Operation, ...]:
        """A dense feed-forward network."""
        between = 2 * self.tokens * 4 * self.hidden * self.width  # before and after GELU
        return (*self.modulated("FFN"), *self.ffn("FFN", self.tokens, 4 * self.hidden, between), *self.gated("FFN"))

    def moe(self) -> tuple[Operation, ...]:
        """Router and predictor, dispatch, experts, combine."""
        model, load, hidden, tokens = self.model, self.load, self.hidden, self.tokens
        experts, wide = model.num_experts, expert_width(model)
        router = [
            self.passes("router input", "router", 3, width=FLOAT, saved=tokens * hidden * FLOAT if load.bf16 else 0),
            Operation("router", "router", 2 * tokens * hidden * experts, calls=1),
            self.passes(
                "softmax, top-k", "router", 20, columns=experts, calls=12, width=FLOAT, saved=tokens * experts * FLOAT
            ),
        ]
        predictor = [
            self.linear("predictor fc1", "predictor", tokens, hidden, hidden),
            self.passes("SiLU", "predictor", 2, saved=2 * self.whole),  # before and after
            self.linear(
                "predictor fc2", "predictor", tokens, hidden, experts
            ),  # kept: logits, and the choice as target
            self.passes(
                "loss", "predictor", 8, columns=experts, calls=6, width=FLOAT, saved=2 * tokens * experts * FLOAT
            ),
        ]
        kept = saved_elements(
            load.kernel, int(load.rows), wide, load.experts, load.device, torch.bfloat16 if load.bf16 else torch.float32
        )
        routed = [
            self.passes(
                "permute", "experts", 2, load.pairs, saved=self.indices + int(load.pairs) * FLOAT
            ),  # and the weights
            self.passes("rows by expert", "experts", 2, load.rows, calls=8, saved=self.order),
            *self.ffn(
                "experts", load.rows, wide, kept * self.width, load.experts, int(load.rows) * hidden * self.width
            ),
            self.passes("weigh", "experts", 4, load.pairs, width=FLOAT, saved=int(load.pairs) * hidden * self.width),
            self.passes("unpermute", "experts", 3, load.pairs, calls=2, width=FLOAT),
        ]
        shared: list[Operation] = []
        if model.shared_experts:
            of_shared = model.shared_experts * wide
            shared = self.ffn("shared experts", tokens, of_shared, 2 * tokens * of_shared * self.width)
        found = [*router, *(predictor if has_predictor(model) else []), *routed, *shared]
        return (*self.modulated("FFN"), *found, *self.gated("FFN"))

    @property
    def indices(self) -> int:
        """Bytes that say which pairs there are."""
        return int(self.load.pairs) * 3 * LONG + self.tokens * LONG

    @property
    def order(self) -> int:
        """Bytes of the order of received rows by expert and its inverse, if several ranks send to several experts."""
        return 2 * int(self.load.rows) * LONG if 1 < self.load.experts < self.model.num_experts else 0

    @property
    def choice(self) -> int:
        """Bytes that an MoE layer keeps of its choice when it is computed again."""
        return self.tokens * self.model.num_experts + self.indices + self.order  # a byte for each token and expert

    def after(self) -> tuple[Operation, ...]:
        """The head and the loss."""
        model, hidden, samples = self.model, self.hidden, self.samples
        pixels = samples * model.in_channels * model.input_size**2
        return (
            self.linear(
                "head modulation", "other", samples, hidden, 2 * hidden, saved=samples * 2 * hidden * self.width
            ),
            *self.modulated("other"),
            self.linear("head", "other", self.tokens, hidden, model.patch**2 * model.out_channels),
            Operation("loss", "other", saved=pixels * FLOAT),  # the difference that it squares
        )
