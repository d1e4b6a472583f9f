"""Predicts the memory of a training step on each device and its host, by engine and precision.

Counts the step's own tensors: weights, gradients, optimizer, what autograd saves for a micro-batch, and large
temporaries. Does not count the CUDA context, NCCL's buffers, kernel workspaces and allocator fragmentation.
`benchmarks/trace_8b.py` adds up every tensor of a real step; docs/results/plan.md compares the two.

This file does not import torch: `llava-llama31 plan` needs only a configuration.

In comments: P parameters, t trained parameters, N devices, S positions of the row, D hidden size, I MLP width, V
vocabulary, a bytes of a number in products, r bytes of a number between the layers, w bytes of a weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from llava_llama31.trainer.costs.flops import ModelShape
from llava_llama31.trainer.costs.parameters import Parameters, decoder_linears
from llava_llama31.trainer.costs.zero import GradientsCome, ZeroGradients, ZeroSettings
from llava_llama31.trainer.recipes.schema import LORA_TARGETS, Recomputed


# of a GPU, as in packed_llama_llava_llama31.py: positions whose logits exist at once, and in float32 at once
_HEAD_ROWS, _SOFTMAX_ROWS = 2048, 512
# bytes per parameter of both moments: 8 bits each and a float32 scale for every 256 (torchao)
_MOMENTS_8BIT = 2 * (1 + 4 / 256)
# bytes per parameter in NF4: 4 bits, 8 of a scale for every 64, and 32 for every 256 scales (Dettmers et al., 2023)
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# elements of one parameter that AdamWBfloat16 widens at once, and the number of float32 copies of them
_STEP_CHUNK, _STEP_COPIES = 2**24, 9
# DeepSpeed's own factor for its host memory: pinned memory comes in powers of two
_HOST_FACTOR = 1.5


@dataclass(frozen=True)
class Engine:
    """Where an engine stores what: whole on each device, sharded, or on the host."""

    name: str
    deepspeed: bool = False
    shards_optimizer: bool = False
    shards_gradients: bool = False
    shards_weights: bool = False
    offloads_weights: bool = False
    offloads_optimizer: bool = False


_ZERO3 = {"deepspeed": True, "shards_optimizer": True, "shards_gradients": True, "shards_weights": True}
ENGINES = {
    engine.name: engine
    for engine in (
        Engine("ddp"),
        Engine("zero1", deepspeed=True, shards_optimizer=True),
        Engine("zero2", deepspeed=True, shards_optimizer=True, shards_gradients=True),
        Engine("zero3", **_ZERO3),
        Engine("zero3-offload-params", **_ZERO3, offloads_weights=True),
        Engine("zero3-offload", **_ZERO3, offloads_weights=True, offloads_optimizer=True),
        Engine("fsdp2", shards_optimizer=True, shards_gradients=True, shards_weights=True),
    )
}


@dataclass(frozen=True)
class MicroBatch:
    """The work of one device's forward pass.

    Args:
        num_tokens: positions of the language model, including padding.
        num_keys: of all segments; exceeds the positions if branches share a trunk.
        num_supervised: positions whose logits are computed, and at which the last layer's MLP runs.
        num_last_queries: queries of the last layer.
        num_tiles: tiles that the vision tower reads.
        num_features: patch features that pass the projector.
        keeps_logits: the loss is the stock one (rows are not packed), which stores all logits.
        copies_attention: attention runs segment by segment, as on a CPU, and a copy joins its outputs.
        fuses: MLPs compute their activation and product in one kernel, as on a GPU, and keep no result of the former.
        head_rows, softmax_rows: positions whose logits exist at once, and in float32 at once.
    """

    num_tokens: int
    num_keys: int
    num_supervised: int
    num_last_queries: int
    num_tiles: int
    num_features: int
    keeps_logits: bool = False
    copies_attention: bool = False
    fuses: bool = True
    head_rows: int = _HEAD_ROWS
    softmax_rows: int = _SOFTMAX_ROWS


@dataclass(frozen=True)
class Setup:
    """What a stage trains and how.

    Args:
        trained: number of parameters that get a gradient, by module group.
        lora_targets: linear layers of the decoder with an adapter of `lora_rank`.
        tower_rank, projector_rank: of adapters on all linear layers of the tower or the projector; 0: none.
        adapters: number of parameters of the adapters, by module group.
        narrow_groups: groups whose frozen weights are exact in bfloat16, including those under adapters.
        quantized: the decoder's linear layers are stored in 4 bits.
        checkpointing: every n-th layer is recomputed; 0: none; `selective`: norms and gated products of the decoder.
        accumulates: more than one micro-batch per step.
    """

    model: ModelShape
    parameters: Parameters
    trained: Mapping[str, int]
    precision: str = "bfloat16"
    optimizer: str = "adamw"
    checkpointing: Recomputed = 0
    accumulates: bool = False
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    tower_rank: int = 0
    projector_rank: int = 0
    adapters: Mapping[str, int] = field(default_factory=dict)
    narrow_groups: frozenset[str] = frozenset()
    quantized: bool = False
    zero: ZeroSettings = ZeroSettings()

    @property
    def num_trained(self) -> int:
        return sum(self.trained.values())

    @property
    def num_adapters(self) -> int:
        return sum(self.adapters.values())

    @property
    def num_weights(self) -> int:
        return sum(self.parameters.groups().values()) + self.num_adapters

    @property
    def trains_decoder(self) -> bool:
        """Whether the decoder's own weights are trained, rather than adapters."""
        return self.trained["language_model"] > 0 and not self.lora_rank


@dataclass(frozen=True)
class Memory:
    """Bytes on a device and on a machine's host; each phase is the peak of everything allocated in it.

    Args:
        weights: between the steps.
        gradients: at their peak, with DDP's buckets.
        optimizer: moments, and DeepSpeed's float32 master weights.
        activations: of a micro-batch, plus what layers, head and gathered weights need while they run.
        save: while a checkpoint is written, whose tensors are gathered one by one.
        host: of one machine, for offloaded state, or for weights while loading.
        host_save: of the machine whose process writes: weights, and then moments, are in its memory as a whole.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    forward: float
    backward: float
    step: float
    save: float
    host: float
    host_save: float

    @property
    def of_a_step(self) -> float:
        return max(self.forward, self.backward, self.step)

    @property
    def peak(self) -> float:
        return max(self.of_a_step, self.save)


def estimate(
    setup: Setup, batch: MicroBatch, engine: Engine, num_devices: int, devices_per_node: int | None = None
) -> Memory:
    """Bytes of any step after the first, when the optimizer has its state."""
    step = _Step(setup, batch, engine, num_devices)
    base = step.weights + step.optimizer + step.standing_buckets
    forward, backward = step.forward_extra, step.backward_extra
    resident = base + step.kept_gradients
    return Memory(
        weights=step.weights,
        gradients=max(step.gradients, step.kept_gradients + step.between),
        optimizer=step.optimizer,
        activations=max(forward, step.backward_activations),
        forward=resident + step.between + forward,
        backward=resident + backward,
        step=base + step.gradients + step.step_extra,
        save=resident + step.gathered_for_a_save,
        host=_host(setup, engine, num_devices, min(devices_per_node or num_devices, num_devices)),
        host_save=_host_while_saving(step),
    )


@dataclass(frozen=True)
class _Step:
    """One device's step, in bytes."""

    setup: Setup
    batch: MicroBatch
    engine: Engine
    num_devices: int

    # bytes per element

    @property
    def half(self) -> bool:
        return self.setup.precision != "float32"

    @property
    def a(self) -> int:
        return 2 if self.half else 4

    @property
    def autocasts(self) -> bool:
        """Whether weights are float32 and cast in every forward pass."""
        return self.setup.precision == "bfloat16" and not self.engine.deepspeed and not self.engine.shards_weights

    @property
    def w(self) -> int:
        """Bytes of a trained weight in use: DeepSpeed and FSDP cast all of them, autocast layer by layer."""
        return 4 if self.autocasts else self.a

    @property
    def kept_w(self) -> int:
        """Bytes of a trained weight in storage: FSDP stores float32 under mixed precision."""
        return 4 if self.engine.shards_weights and not self.engine.deepspeed else self.w

    @property
    def r(self) -> int:
        """Bytes of a number between the decoder's layers: set by the embeddings, which autocast leaves alone."""
        wide = self.autocasts and "language_model" not in self.setup.narrow_groups
        return 4 if wide or not self.half else 2

    @property
    def shares(self) -> int:
        return self.num_devices if self.engine.shards_weights else 1

    # states

    @cached_property
    def weights(self) -> float:
        """P weights, or this device's shard; frozen groups are narrowed if nothing shards them."""
        if self.engine.offloads_weights:
            return 0.0
        setup = self.setup
        total = float(setup.num_adapters * self.kept_w)
        for group, number in setup.parameters.groups().items():
            width = 2 if self.autocasts and group in setup.narrow_groups else self.kept_w
            packed = 0
            if group == "language_model" and setup.quantized:
                packed = setup.model.num_layers * sum(i * o for i, o in decoder_linears(setup.model).values())
            total += (number - packed) * width + packed * _NF4
        return total / self.shares

    @cached_property
    def optimizer(self) -> float:
        """Two moments per trained parameter; DeepSpeed always adds float32 master weights."""
        if self.engine.offloads_optimizer:
            return 0.0
        shares = self.num_devices if self.engine.shards_optimizer else 1
        if self.engine.deepspeed:
            per_number: float = 12
        else:
            per_number = {"adamw": 2 * self.kept_w, "adamw_bf16": 4, "adamw_8bit": _MOMENTS_8BIT}[self.setup.optimizer]
        return self.setup.num_trained * per_number / shares

    @cached_property
    def kept_gradients(self) -> float:
        """Gradients whose memory is never freed: DDP's buckets and ZeRO-3's flat buffer."""
        if self.engine.name == "ddp" and self.num_devices > 1:
            return float(self.setup.num_trained * self.kept_w)
        if self.zero is not None and self.engine.shards_weights and not self.engine.offloads_optimizer:
            return self.zero.own
        return 0.0

    @cached_property
    def zero(self) -> ZeroGradients | None:
        """DeepSpeed's gradients and buckets."""
        setup, engine = self.setup, self.engine
        if not engine.deepspeed:
            return None
        stage = 3 if engine.shards_weights else 2 if engine.shards_gradients else 1
        bucket = setup.zero.reduce_bucket
        linears = [i * o for i, o in decoder_linears(setup.model).values()] if setup.trains_decoder else []
        return ZeroGradients(
            settings=setup.zero,
            stage=stage,
            bucket=setup.model.hidden_size**2 if bucket is None else bucket,
            width=self.a,
            num_trained=setup.num_trained,
            num_devices=self.num_devices,
            matrix=setup.parameters.embedding if setup.trains_decoder else 0,
            linears=tuple(linears),
            accumulates=setup.accumulates,
        )

    @cached_property
    def standing_buckets(self) -> float:
        return 0.0 if self.zero is None else self.zero.standing

    @cached_property
    def between(self) -> float:
        """Gradients between the micro-batches of a step, beyond those that are never freed."""
        if self.zero is not None:
            return 0.0 if self.engine.shards_weights else self.zero.between
        return self.gradients - self.kept_gradients if self.setup.accumulates else 0.0

    @cached_property
    def gradients(self) -> float:
        """All gradients after the backward pass, in the type of their weights."""
        if self.zero is not None:
            return 0.0 if self.engine.offloads_optimizer else self.zero.own
        if self.engine.name == "ddp" and self.num_devices > 1 and not self.setup.accumulates:
            return self.kept_gradients  # of which they are views, once the micro-batch that is reduced has its own
        shares = self.num_devices if self.engine.shards_gradients else 1
        return self.kept_gradients + self.setup.num_trained * self.kept_w / shares

    @cached_property
    def step_extra(self) -> float:
        """Temporary memory of the optimizer's step; fused AdamW works in place."""
        if self.zero is not None:
            return 0.0 if self.engine.offloads_optimizer else self.zero.stepping
        if self.setup.optimizer == "adamw_bf16":
            model = self.setup.model
            largest = max(self.setup.parameters.embedding, model.hidden_size * model.intermediate_size)
            return min(_STEP_CHUNK, largest, self.setup.num_trained) * _STEP_COPIES * 4.0
        return 0.0

    # activations

    @cached_property
    def layer(self) -> float:
        """What autograd saves for a decoder layer that runs at every position, without its input."""
        return self._layer(self.batch.num_tokens, self.batch.num_tokens)

    @cached_property
    def last_layer(self) -> float:
        return self._layer(self.batch.num_last_queries, self.batch.num_supervised)

    def _layer(self, num_queries: int, num_outputs: int) -> float:
        """Tensors that a layer's backward pass reads.

        Attention: rotated queries, keys and values in the kernel's layout, its output, and a logarithm per query and
        head. MLP: gate, its activation where that is not fused, and the other factor. Linear layers that are trained
        or have an adapter: their input, i.e. the output of both norms and of attention, and the MLP's product; an
        adapter also its inner product. Under autocast PEFT widens the input of each adapter and autocast narrows it
        again: a copy each. Norms: their input, which is the residual stream, and a scale. Selective checkpointing
        makes the output of norms and the MLP's product again; adapters keep them in another type.
        """
        model, batch, a = self.setup.model, self.batch, self.a
        num_tokens, hidden, wide = batch.num_tokens, model.hidden_size, model.num_heads * model.head_dim
        narrow = model.num_key_value_heads * model.head_dim
        attention = a * (num_queries * wide * 2 + batch.num_keys * narrow * 2) + 4 * num_queries * model.num_heads
        joins = batch.copies_attention or num_outputs < num_queries or self.casts_inputs
        if self._reads_input("o_proj") and joins:
            attention += a * num_outputs * wide
        remakes = self.remakes and not self.setup.lora_rank
        num_wide = 2 if self.remakes or (batch.fuses and not batch.keeps_logits) else 3
        num_wide += self._reads_input("down_proj") and not remakes
        mlp = a * num_outputs * model.intermediate_size * num_wide
        norms = a * hidden * num_tokens * self._inputs("k_proj", "v_proj")
        if self.casts_inputs:
            norms += a * hidden * num_queries * self._inputs("q_proj")
        elif not norms:
            norms = a * hidden * num_tokens * self._inputs("q_proj")
        norms += a * hidden * num_outputs * self._inputs("gate_proj", "up_proj")
        if remakes:  # of the last layer, queries read some rows, which are another tensor
            norms = a * hidden * num_queries * (num_queries < num_tokens) * self._reads_input("q_proj")
        stream = self.r * num_outputs * hidden + 4 * (num_tokens + num_outputs)
        rows = dict(zip(LORA_TARGETS, (num_queries, *[num_tokens] * 2, *[num_outputs] * 4), strict=True))
        adapters = a * self.setup.lora_rank * sum(rows[name] for name in self.setup.lora_targets)
        return float(attention + mlp + norms + stream + adapters)

    def _reads_input(self, *names: str) -> bool:
        """Whether the backward pass of one of these linear layers reads its input."""
        return self.setup.trains_decoder or any(name in self.setup.lora_targets for name in names)

    def _inputs(self, *names: str) -> int:
        """Copies of an input that these linear layers share, for their backward pass."""
        if self.casts_inputs:
            return sum(name in self.setup.lora_targets for name in names)
        return int(self._reads_input(*names))

    @property
    def casts_inputs(self) -> bool:
        """Whether each adapter has a copy of its input of its own."""
        return self.autocasts and self.setup.lora_rank > 0

    @cached_property
    def layer_input(self) -> float:
        return float(self.r * self.batch.num_tokens * self.setup.model.hidden_size)

    @property
    def remakes(self) -> bool:
        return self.setup.checkpointing == "selective"

    def _recomputes(self, layer: int) -> bool:
        every = self.setup.checkpointing
        return isinstance(every, int) and every > 0 and layer % every == 0

    def kept_by(self, layer: int) -> float:
        """Bytes of a decoder layer that outlive its forward pass."""
        if self._recomputes(layer):
            return self.layer_input
        return self.layer_input + self.inside(layer) + self.cast_layer

    def inside(self, layer: int) -> float:
        return self.last_layer if layer == self.setup.model.num_layers - 1 else self.layer

    @cached_property
    def cast_layer(self) -> float:
        """Autocast's copies of a layer's weights: 2 bytes each if they are float32."""
        wide = self.autocasts and "language_model" not in self.setup.narrow_groups and not self.setup.quantized
        return 2.0 * self.setup.parameters.decoder_layer if wide else 0.0

    @cached_property
    def kept_casts(self) -> float:
        """Copies of trained weights that autocast caches until the forward pass ends, beyond what layers save."""
        if not self.setup.trains_decoder:
            return 0.0
        return sum(self.cast_layer for layer in range(self.setup.model.num_layers) if self._recomputes(layer))

    @cached_property
    def decoder_kept(self) -> float:
        return sum(self.kept_by(layer) for layer in range(self.setup.model.num_layers))

    @cached_property
    def tower_kept(self) -> float:
        """What autograd saves for a trained tower until its backward pass; nothing for a frozen one."""
        if not self.setup.trained["vision_tower"]:
            return 0.0
        tower, num = self.setup.model.tower, self.batch.num_tiles * self.setup.model.tower.num_positions
        width = 4 if self.autocasts or not self.half else 2
        if not self.recomputes_tower:
            return tower.num_layers * (width * num * tower.hidden_size + self.tower_layer)
        # adapters leave the tower's own weights in bfloat16, and so what passes between its layers
        width = min(width, 2 if "vision_tower" in self.setup.narrow_groups else 4)
        return float(tower.num_layers * width * num * tower.hidden_size)

    @property
    def recomputes_tower(self) -> bool:
        return self.setup.checkpointing in (1, "selective")

    @cached_property
    def tower_recomputed(self) -> float:
        """A layer's activations, while the tower's backward pass makes them again."""
        return self.tower_layer if self.setup.trained["vision_tower"] and self.recomputes_tower else 0.0

    @cached_property
    def tower_layer(self) -> float:
        """Saved by a layer: inputs of both norms, their outputs (one per product under autocast), attention, MLP."""
        tower, a = self.setup.model.tower, self.a
        num, width = self.batch.num_tiles * tower.num_positions, 4 if self.autocasts or not self.half else 2
        inner = tower.mlp[0][1]
        copies = 4 if self.autocasts else 2
        return num * (
            tower.hidden_size * (width + a * (copies + 5 + 2 * tower.saves_output)) + tower.saved_by_mlp * a * inner
        )

    @cached_property
    def tower_transient(self) -> float:
        """Peak of a frozen tower: a layer's MLP."""
        tower = self.setup.model.tower
        num = self.batch.num_tiles * tower.num_positions
        return float(self.a * num * (3 * tower.mlp[0][1] + 4 * tower.hidden_size))

    @cached_property
    def projector_kept(self) -> float:
        """Chosen features, input and output of the activation; nothing if both projector and tower are frozen."""
        if not (self.setup.trained["multi_modal_projector"] or self.setup.trained["vision_tower"]):
            return 0.0
        model = self.setup.model
        width = model.tower.hidden_size * model.tower.num_feature_layers + 2 * model.hidden_size
        return float(self.a * self.batch.num_features * width)

    # the head: a chunk's logits in both types; gradients of the hidden states and of V x D weights

    @cached_property
    def head_weights(self) -> float:
        return float(self.setup.parameters.embedding)

    @cached_property
    def head_gradient(self) -> float:
        return self.w * self.head_weights if self.setup.trains_decoder else 0.0

    @cached_property
    def head(self) -> float:
        """Peak of the head, whose loss computes the gradients in the forward pass.

        The sum of the chunks' weight gradients (w), and a chunk's own if the products have another type; then also
        the weights in that type.
        """
        model, batch, a = self.setup.model, self.batch, self.a
        if batch.keeps_logits:
            return float(batch.num_supervised * model.vocab_size * (a + 3 * 4))
        rows = min(batch.num_supervised, batch.head_rows)
        logits = model.vocab_size * (rows * a + (min(rows, batch.softmax_rows) * 4 if a < 4 else 0))
        hidden = batch.num_supervised * model.hidden_size * (2 * a)
        weights = self.head_gradient
        if self.setup.trains_decoder and self.w < 4 and batch.num_supervised > rows and batch.head_rows == _HEAD_ROWS:
            weights += 4 * self.head_weights  # chunks add up in float32
        if self.autocasts and self.r == 4:
            weights += a * self.head_weights
        if self.setup.trains_decoder and self.w != a:
            weights += a * self.head_weights
        return float(logits + hidden) + weights

    # temporarily gathered weights

    @cached_property
    def gathered(self) -> float:
        """ZeRO-3 keeps up to `max_live` parameters gathered; FSDP two groups of layers, or the head twice."""
        if not self.engine.shards_weights:
            return 0.0
        parameters = self.setup.parameters
        if self.engine.deepspeed:
            live = max(parameters.largest, min(self.setup.zero.max_live, self.setup.num_weights))
            return float(self.a * live)
        return float(self.a * 2 * parameters.embedding)

    @cached_property
    def gathered_layers(self) -> float:
        """Gathered weights while a decoder layer runs.

        FSDP has a layer's also as they were received, until it receives the next ones. ZeRO-3 gathers whole weights,
        the last of them on top of `max_live`, and has those that it gathered together as they were received, too,
        until all of them are in use.
        """
        if not self.engine.shards_weights:
            return 0.0
        setup = self.setup
        if not self.engine.deepspeed:
            return float(self.a * 2 * setup.parameters.decoder_layer)
        linear = max(i * o for i, o in decoder_linears(setup.model).values())
        together = 0.9 * setup.model.hidden_size**2 if setup.zero.prefetch is None else setup.zero.prefetch
        together = min(together, setup.num_weights)
        live = min(max(setup.parameters.largest, setup.zero.max_live + linear), setup.num_weights)
        return float(self.a * (live + (together if together > linear else 0.0)))

    @cached_property
    def gathering_head(self) -> float:
        """On top of the states when the head is gathered, in the forward pass.

        FSDP then still has the last layer's weights as they were received. ZeRO-3 gathers the head when its layers
        are fewer than `max_live` numbers: on top of these, while the first of them runs.
        """
        setup, num_layers = self.setup, self.setup.model.num_layers
        if not self.engine.shards_weights:
            return 0.0
        kept = self.kept_until_backward
        if not self.engine.deepspeed:
            return kept + self.gathered + self.a * setup.parameters.decoder_layer
        ahead = min(int(setup.zero.max_live // setup.parameters.decoder_layer), num_layers - 1)
        kept -= sum(self.kept_by(layer) for layer in range(num_layers - ahead, num_layers))
        live = min(setup.zero.max_live + setup.parameters.embedding, setup.num_weights)
        return kept + self.running + self.a * live

    @property
    def held_for_reduction(self) -> float:
        """Bytes of a number of the gradients that FSDP has sent, which it keeps until the next group's are there."""
        return 4.0 if self.engine.name == "fsdp2" and self.setup.trains_decoder else 0.0

    @cached_property
    def gathered_for_a_save(self) -> float:
        """The largest tensor whole: FSDP joins its parts into another one, ZeRO-3 gathers the float32 original too."""
        if not self.engine.shards_weights:
            return 0.0
        width = self.a + 4 if self.engine.deepspeed else 2 * 4
        return float(width * self.setup.parameters.largest)

    # phases

    @cached_property
    def forward_extra(self) -> float:
        """On top of the states: at the head, with all activations, or within the last full layer."""
        kept = self.tower_kept + self.projector_kept + self.decoder_kept + self.kept_casts
        at_head = kept + self.head + self.gathered
        in_layer = kept + self.running + self.gathered_layers
        return max(at_head, in_layer, self.gathering_head, self.tower_transient + self.gathered_layers)

    @cached_property
    def backward_extra(self) -> float:
        """On top of states and kept gradients: each layer's backward adds its gradients and frees its activations."""
        kept, come = self.kept_until_backward, self.gradients_come
        alone = self.whole_gradient
        if self.zero is not None:
            alone += self.zero.buckets + self.zero.reducing_matrix
        peak, there = kept + come.at_head + alone, come.in_layers
        for layer in reversed(range(self.setup.model.num_layers)):
            peak = max(peak, kept + there + self.beside(layer))
            kept -= self.kept_by(layer)
            there += come.of_layer
        # the embedding's gradient comes last, or the tower's
        peak = max(peak, come.at_end + alone + self.tied_gradients)
        buckets = 0.0 if self.zero is None else self.zero.buckets
        return max(peak, come.at_end + self.tower_kept + self.tower_recomputed + buckets)

    @cached_property
    def gradients_come(self) -> GradientsCome:
        """Gradients that are there in the course of the backward pass, beyond those that are never freed."""
        setup, num_layers = self.setup, self.setup.model.num_layers
        if self.zero is not None:
            return self.zero.come(num_layers)
        new = self.gradients - self.kept_gradients
        if setup.accumulates:
            return GradientsCome(new, new, 0.0, new)
        per_number = new / max(setup.num_trained, 1)
        of_head = per_number * self.head_weights * setup.trains_decoder
        of_layer = setup.trained["language_model"] / num_layers
        if setup.trains_decoder:
            of_layer = setup.parameters.decoder_layer
        return GradientsCome(of_head, of_head, per_number * of_layer, new)

    @cached_property
    def kept_until_backward(self) -> float:
        return self.tower_kept + self.projector_kept + self.decoder_kept

    @cached_property
    def tied_gradients(self) -> float:
        """A tied head's extra gradients: the embedding's own, and its sum with the head's, which is another tensor."""
        if not (self.setup.parameters.tied and self.setup.trains_decoder):
            return 0.0
        return float(2 * self.w * self.setup.parameters.embedding)

    @cached_property
    def whole_gradient(self) -> float:
        """Gradient of head or embedding before it is accumulated or sharded, which FSDP does in float32."""
        if not self.setup.trains_decoder or not (self.zero or self.engine.shards_gradients or self.setup.accumulates):
            return 0.0
        reduced = 4 if self.engine.name == "fsdp2" and self.half else 0
        return float((self.w + reduced) * self.setup.parameters.embedding)

    def beside(self, layer: int) -> float:
        """A layer's backward pass: what it recomputes, gathered weights, and gradients within MLP and norm."""
        recomputed = self.inside(layer) + self.cast_layer if self._recomputes(layer) else 0.0
        if self.remakes:
            recomputed = float(self.a * self.batch.num_tokens * self.setup.model.hidden_size)
        is_last = layer == self.setup.model.num_layers - 1
        outputs = self.batch.num_supervised if is_last else self.batch.num_tokens
        within, norm = self.within(outputs, again=recomputed > 0), self.within_norm
        if self.zero is not None:  # when a bucket is full, a weight has its gradient, and its input is freed
            within, norm = max(within, self.zero.reducing) + self.zero.buckets, norm + self.zero.buckets
        parameters = self.setup.parameters
        before = self.held_for_reduction * (parameters.embedding if is_last else parameters.decoder_layer)
        if self.held_for_reduction:  # a layer's gradients are there before it is through
            norm += self.a * parameters.decoder_layer
        return max(recomputed + within, norm) + before + self.layer_input + self.gathered_layers

    @cached_property
    def within_norm(self) -> float:
        """Temporary memory of the backward pass of a layer's first norm, which comes last and runs at every position.

        The gradients of its result and of its input; unless it is one kernel, four tensors in float32.
        """
        wide = 0 if self.batch.fuses and not self.batch.keeps_logits else 4 * 4
        return float((2 * self.a + wide) * self.batch.num_tokens * self.setup.model.hidden_size)

    def within(self, num_outputs: int, *, again: bool) -> float:
        """Temporary memory of a layer's backward pass.

        Three gradients of the MLP, of which the input of its last product makes room for one where that was kept for
        the weights' gradient; and this gradient, as it is computed and in the weights' type. A layer that runs `again`
        ends with its last adapter.
        """
        model, setup = self.setup.model, self.setup
        number = 2 if self.zero is not None or setup.lora_rank or setup.trains_decoder else 3
        gradients = float(number * self.a * num_outputs * model.intermediate_size)
        if setup.trains_decoder and self.zero is None:
            types = self.a if self.w == self.a else self.a + self.w
            gradients += types * model.hidden_size * model.intermediate_size
        if not (again and self.setup.lora_rank):
            return gradients
        return max(gradients, self.last_adapter(num_outputs))

    def last_adapter(self, num_outputs: int) -> float:
        """Temporary memory of a layer's last adapter, that of the MLP's second product.

        That product, also in float32, the output of its norm and of the frozen layer under the adapter, and what
        attention's adapter was given; a frozen layer in 4 bits is unpacked.
        """
        model, setup, a = self.setup.model, self.setup, self.a
        wide = (a + 4) * model.intermediate_size if self.casts_inputs and "down_proj" in setup.lora_targets else 0
        joined = model.num_heads * model.head_dim if self.casts_inputs and self.batch.copies_attention else 0
        unpacked = max(i * o for i, o in decoder_linears(model).values()) if setup.quantized else 0
        return float(num_outputs * (wide + a * (2 * model.hidden_size + joined)) + a * unpacked)

    @cached_property
    def running(self) -> float:
        """Beside what is kept while a decoder layer runs; with adapters, unless it is run again, what is temporary."""
        keeps = self.setup.checkpointing in (0, "selective")
        return self.last_adapter(self.batch.num_tokens) if keeps and self.setup.lora_rank else self.layer

    @cached_property
    def backward_activations(self) -> float:
        last = self.setup.model.num_layers - 1
        kept = self.kept_until_backward
        return kept + max(self.beside(last), self.beside(last - 1) - self.kept_by(last) if last else 0.0)


def _host_while_saving(step: _Step) -> float:
    """DeepSpeed's processes write their own moments from where they are; adapters are saved without their base."""
    setup = step.setup
    if step.engine.deepspeed:
        return 4.0 * (setup.num_trained if setup.adapters else setup.num_weights)
    weights = step.kept_w * (setup.num_trained if setup.adapters else setup.num_weights)
    per_number = {"adamw": 2 * step.kept_w, "adamw_bf16": 4, "adamw_8bit": _MOMENTS_8BIT}[setup.optimizer]
    return float(max(weights, setup.num_trained * per_number))


def _host(setup: Setup, engine: Engine, num_devices: int, devices_per_node: int) -> float:
    """Host bytes of a machine: what DeepSpeed offloads (its estimator's terms), or weights while loading.

    Offloading takes 2 bytes of weights and 16 of gradients and optimizer per parameter, times 1.5 for buffers. ZeRO-3
    loads straight into its shards, holding the largest part meanwhile; under FSDP one process of a machine loads all
    weights, otherwise every process does.
    """
    share = devices_per_node / num_devices
    if engine.offloads_weights or engine.offloads_optimizer:
        weights = 2.0 * setup.num_weights * engine.offloads_weights
        return (weights + 16.0 * setup.num_trained * engine.offloads_optimizer) * share * _HOST_FACTOR
    if engine.deepspeed and engine.shards_weights:
        return 4.0 * setup.parameters.largest * devices_per_node * _HOST_FACTOR
    width = 2.0 if setup.precision == "bfloat16-weights" else 4.0
    return width * setup.num_weights * (1 if engine.name == "fsdp2" else devices_per_node)
