"""What a packed training step of a large model costs on a GPU, on paper: operations, bytes and memory, part by part.

```
python benchmarks/roofline.py hub_configs/kcfi-vitl14-qwen2-1.5b --pairs 32
```

Nothing is computed: every part of the model runs forward and backward on the meta device, in bf16, its language model
frozen, and each kernel is noted with its operations (`measure.operation_counter`) and the bytes of the tensors that it
reads and writes. On a card a kernel takes at least the larger of operations / peak and bytes / bandwidth. Two bounds
of a step follow: **kernel by kernel**, as PyTorch runs it, and **fused**, where only products, attention and
convolutions move their tensors and all between them happens on the way, the most that a compiler could do. What a
card really does lies below: no product reaches the peak, and launches, communication and the loader are left out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from flops import CAPTION, PROMPT, asked, build
from measure import operation_counter
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kcfi.training.collator import packed_attention_mask

TARGET = 0.45  # share of a card's peak that is wanted
OPTIMIZER = "optimizer"


class Card(NamedTuple):
    """What its maker publishes of a GPU."""

    name: str
    peak: float  # operations per second, bf16, dense
    bandwidth: float  # bytes per second


# NVIDIA's data sheets, read where others quote them (2026-11-30); the sheets themselves were not at hand
CARDS = (
    # SXM, 80 GB, sheet 1758950-r4: https://glennklockwood.com/garden/processors/A100
    Card("A100", 312e12, 2.039e12),
    # SXM5: https://archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html has 1,979 TFLOPS with sparsity, "1/2 lower
    # without", and 3,350 GB/s; https://glennklockwood.com/garden/processors/h100 has 989.4, dense
    Card("H100", 989.4e12, 3.35e12),
)


class Kernel(NamedTuple):
    """One call of a part, forward or backward."""

    name: str  # of the call in PyTorch
    operations: int
    bytes: int  # read and written


class KernelCounter(TorchDispatchMode):
    """Notes every call but views, which move nothing, and what autograd keeps for the backward pass.

    Attributes:
        kernels: the calls, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.formulas = operation_counter().flop_registry
        self._kept: dict[int, torch.UntypedStorage] = {}  # by number, for several tensors may share one

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a call and note it."""
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            formula = self.formulas.get(function.overloadpacket)
            operations = formula(*args, **(kwargs or {}), out_val=result) if formula else 0
            name = function.overloadpacket.__name__
            self.kernels.append(Kernel(name, int(operations), sum(stored_bytes(tensor) for tensor in tensors)))
        return result

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Note a tensor that is kept for the backward pass (a hook of `saved_tensors_hooks`); weights are not."""
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            self._kept[storage._cdata] = storage
        return tensor

    def kept_bytes(self) -> int:
        """Bytes of all tensors kept."""
        return sum(storage.nbytes() for storage in self._kept.values())


class FusedAttention(TorchFunctionMode):
    """Attention as the one kernel that GPUs have for it; the meta device writes out its matrix of scores."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace `scaled_dot_product_attention` alone."""
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))

        def attend(query: Any, key: Any, value: Any, attn_mask: Any = None, **_: Any) -> Any:
            bias = None if attn_mask is None else attn_mask.expand(*query.shape[:3], key.shape[2])
            return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)[0]

        return attend(*args, **(kwargs or {}))


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of memory behind a tensor's elements; a row that is repeated by `expand` counts once."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


class Part(NamedTuple):
    """What a part of the model does in a step."""

    kernels: list[Kernel]
    kept: int  # bytes of activations


def parts_of(model: Any, pairs: int, captions: int = 5) -> dict[str, Callable[[], Any]]:
    """The parts of a packed training step: functions that run them forward on inputs of the right shapes.

    Args:
        model: of `flops.build`.
        pairs: rows of the step.
        captions: of each pair.
    """
    core, side = model.model, model.config.image_size
    grid = (side // core.patch_size,) * 2
    width, dtype = model.config.text_config.hidden_size, model.dtype
    answers = captions * (1 + CAPTION)
    length = (side // core.token_size) ** 2 * model.config.num_image_tokens + PROMPT + answers

    def tensor(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device="meta", requires_grad=True)

    stages = [tensor(pairs, model.config.tower.hidden_size, *grid) for _ in range(model.config.num_stages)]
    change = tensor(pairs, grid[0] * grid[1], model.config.change_width)
    mask = torch.zeros(pairs, 1, length, length, dtype=dtype, device="meta")
    words = torch.zeros(pairs, answers + 1, dtype=torch.long, device="meta")
    pixels = tensor(pairs, 2, 3, side, side).detach()
    parts = {
        "vision tower": lambda: core.encode_dates(pixels)[:2],
        "key change perceiver": lambda: core.get_change_features(stages, stages),
        "projector": lambda: core.projector(change, grid),
        "change detection head": lambda: core.change_detection_head(change, grid, (side, side)),
        "language model": lambda: (
            core.language_model(
                inputs_embeds=tensor(pairs, length, width), attention_mask=mask, use_cache=False
            ).last_hidden_state
        ),
        "output layer and loss": lambda: model.caption_loss_function(
            model.lm_head, tensor(pairs, answers + 1, width), words, 1
        ),
    }
    if core.change_detection_head is None:
        del parts["change detection head"]
    return parts


def count(run: Callable[[], Any]) -> Part:
    """Watch a part run forward and backward."""
    counter = KernelCounter()
    with FusedAttention(), counter, torch.autograd.graph.saved_tensors_hooks(counter.keep, lambda tensor: tensor):
        outputs = [leaf for leaf in tree_leaves(run()) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        kept = counter.kept_bytes()  # before the backward pass, which may compute something again
        torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
    return Part(counter.kernels, kept)


def optimizer_step(model: Any) -> Part:
    """A fused AdamW step in fp32: a dozen operations per weight; it reads weight, gradient and two moments."""
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return Part([Kernel("adamw", 12 * trained, (4 + 3) * 4 * trained)], 0)


def seconds(kernels: Iterable[Kernel], card: Card, fused: bool) -> float:
    """The least time of kernels on a card: each the larger of computing and moving.

    Args:
        kernels: of a part or of a step.
        card: whose peak and bandwidth count.
        fused: whether kernels without counted operations happen on the way of others, for nothing.
    """
    return sum(
        max(kernel.operations / card.peak, kernel.bytes / card.bandwidth)
        for kernel in kernels
        if kernel.operations or not fused
    )


def step_memory(model: Any, parts: Mapping[str, Part]) -> dict[str, int]:
    """Bytes of a step: weights, what trains (gradient and two moments in fp32), activations kept, by what they are.

    What trains is kept in fp32, a frozen language model in bf16 (`bf16_language_model`).
    """
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    frozen = sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
    return {
        "weights": 4 * trained + 2 * frozen,
        "gradients and moments": 12 * trained,
        "activations": sum(part.kept for part in parts.values()),
    }


def packed_blocks(length: int, captions: int = 5) -> float:
    """Share of the attention matrix's blocks of 128 x 128 that flex attention computes in a packed row.

    Args:
        length: of the row, whose end are the captions.
        captions: of the pair.
    """
    segment = torch.arange(captions).repeat_interleave(1 + CAPTION) + 1
    row = torch.cat([torch.zeros(length - len(segment), dtype=torch.long), segment])
    return 1 - packed_attention_mask(row[None], "flex_attention", torch.float32).sparsity() / 100


def table(parts: Mapping[str, Part], cards: Sequence[Card]) -> str:
    """Markdown: of every part and of the step what it computes and moves, and its two bounds on every card."""
    heads = ["part", "TFLOP", "GB moved", "FLOP per byte", *(f"{card.name}, ms" for card in cards)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    rows = {**parts, "**step**": Part([kernel for part in parts.values() for kernel in part.kernels], 0)}
    for name, part in rows.items():
        operations = sum(kernel.operations for kernel in part.kernels)
        moved = sum(kernel.bytes for kernel in part.kernels)
        bounds = [
            " / ".join(f"{1e3 * seconds(part.kernels, card, fused):.1f}" for fused in (False, True)) for card in cards
        ]
        cells = [f"{operations / 1e12:.2f}", f"{moved / 1e9:,.0f}", f"{operations / moved:,.0f}", *bounds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table of a config, and what it says of the target."""
    config, pairs = asked(__doc__)
    model = build(config).to(torch.bfloat16)
    parts = {name: count(run) for name, run in parts_of(model, pairs).items()}
    parts[OPTIMIZER] = optimizer_step(model)
    print(table(parts, CARDS))
    kernels = [kernel for part in parts.values() for kernel in part.kernels]
    operations = sum(kernel.operations for kernel in kernels)
    for card in CARDS:
        wanted = operations / (TARGET * card.peak)
        single, fused = (operations / card.peak / seconds(kernels, card, way) for way in (False, True))
        print(
            f"{card.name}: {TARGET:.0%} of the peak is {1e3 * wanted:.0f} ms, {pairs / wanted:.0f} pairs/s; "
            f"at most {single:.0%} kernel by kernel, {fused:.0%} fused"
        )
    memory = step_memory(model, parts)
    sizes = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in memory.items())
    print(f"memory: {sum(memory.values()) / 1e9:.1f} GB ({sizes})")
    attention = sum(kernel.operations for kernel in parts["language model"].kernels if "attention" in kernel.name)
    tokens = (config.image_size // config.visual_token_size) ** 2 * config.num_image_tokens
    blocks = packed_blocks(tokens + PROMPT + 5 * (1 + CAPTION))
    print(
        f"attention of the language model: {attention / operations:.1%} of the operations, of which flex attention "
        f"computes {blocks:.0%}"
    )


if __name__ == "__main__":
    main()
