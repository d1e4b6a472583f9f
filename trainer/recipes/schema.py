"""The models of a recipe: the model's parts, the stages, the evaluation and where to publish.

Every object is frozen and checked when it is made; an error names the key and its fix.
"""

import math
import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from llava_llama31.trainer.recipes.data_formats import DataFormat
from llava_llama31.trainer.redaction import holds_credential


ModuleGroup = Literal["vision_tower", "multi_modal_projector", "language_model"]
Policy = Literal["error", "skip", "quarantine"]
Fraction = Annotated[float, Field(ge=0, lt=1)]

# the linear layers of a decoder layer, by their names in the Llama model
LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_TARGETS: tuple[str, ...] = get_args(LoraTarget)

# every how many-th layer is computed twice, 0: none; or only what takes no matrix product
Recomputed = int | Literal["selective"]

# as TrainingArguments and huggingface_hub call it
_TOKEN_FIELDS = ("hub_token", "token")


# keys of `model` that name a checkpoint
MODEL_PARTS = ("checkpoint", "vision_tower", "language_model", "projector")

# beyond it floats do not count one by one
_LARGEST = 2**53
# what a key's number is used for takes less: NumPy's seed, a wait of the system, an array of rows, processes
_LARGEST_OF = {
    "seed": 2**32 - 1,
    "step_timeout": 10**9,
    "loader_timeout": 10**9,
    "epochs": 10**6,
    "weight": 10**6,
    "dataloader_workers": 10**4,
    "r": 2**16,
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*")
    @classmethod
    def _in_range(cls, value: Any, info: ValidationInfo) -> Any:
        largest = _LARGEST_OF.get(info.field_name or "", _LARGEST)
        for key, number in _numbers(value if isinstance(value, int | float | dict) else None):
            if largest < abs(number) < math.inf:  # what is not finite has its own message
                shown = f"{number:.3g}" if isinstance(number, float) else f"a number of {number.bit_length()} bits"
                what = f"{key} is {shown}" if key else shown
                raise ValueError(f"{what} is out of range (fix: give {largest} at most)")
        return value


# former spellings of keys, in recipes and in the runs that began with them
FORMER_KEYS = {"licence": "license", "vision_tower_licence": "vision_tower_license"}


def with_present_keys(content: Any) -> Any:
    """A mapping with former keys renamed to their present names; a key given under both names stays as it is."""
    if not isinstance(content, dict):
        return content
    return {new if (new := FORMER_KEYS.get(key, key)) not in content else key: value for key, value in content.items()}


# of a stage: they change what is done about trouble and not what is trained, so a run that began may change them
CHANGEABLE = ("on_nonfinite", "on_spike", "step_timeout", "loader_timeout")


class Where(_Frozen):
    """A condition on a column of a row, or on each turn's number in a list column; what fails it is left out."""

    min: float | None = None
    """Smallest number to take."""
    max: float | None = None
    """Largest number to take."""
    one_of: list[str | int | float | bool] | None = Field(None, min_length=1)
    """Values to take."""

    @model_validator(mode="after")
    def _says_something(self) -> "Where":
        if self.min is None and self.max is None and self.one_of is None:
            raise ValueError("it has no condition (fix: give min, max or one_of)")
        return self


class Contamination(_Frozen):
    """An evaluation's questions whose images are looked for in the stage's data."""

    against: list[str] = Field(min_length=1)
    """Files of questions, as `evaluate` reads them."""
    image_root: str | None = None
    """Folder of the questions' images; default: that of each file."""
    near_bits: Annotated[int, Field(ge=0, le=127)] = 40
    """How many of the perceptual hash's 256 bits may differ in a near duplicate."""
    reject: Literal["images", "images_and_questions", "nothing"] = "images"
    """Rows to reject as `evaluation_image` and `evaluation_question`; `nothing`: only report them."""


class DataSource(_Frozen):
    """One set of records: JSON or JSON lines, WebDataset shards, parquet, a saved Hugging Face dataset or a Hub id."""

    name: str
    """What the source is called in reports; each name once in a stage."""
    path: str
    """File, folder, URL, or a data set's Hub id."""
    image_root: str | None = None
    """Folder that image paths are relative to and may not leave; default: the folder of `path`."""
    format: Literal["auto", DataFormat] = "auto"
    """Format of the rows; `auto` detects it."""
    split: str = "train"
    """Split of a folder of parquet, a saved data set or a data set on the Hub."""
    sample: PositiveInt | None = None
    """Number of rows to draw, without replacement, seeded; default: all."""
    sample_when: Literal["before_filtering", "after_filtering"] = "after_filtering"
    """Whether `sample` draws from all rows or from the usable ones."""
    weight: PositiveFloat = 1.0
    """How often an epoch sees each training row: 2.5 is twice, and half of them, drawn by the seed, a third time."""
    images_only: bool = False
    """Reject rows without an image, with the reason `text_only`."""
    max_pixels: PositiveInt | None = None
    """Largest image that is read, height x width; others are rejected by their headers; default: 40 million."""
    where: dict[str, Where] = {}
    """Rows to take, by their columns; the others are left out and counted under the reason `filtered`."""
    license: str | None = None
    """Licence of the data, for the model card."""
    hub_id: str | None = None
    """Data set on the Hub that the rows come from, for the model card."""

    _present_keys = model_validator(mode="before")(with_present_keys)


class Model(_Frozen):
    """Where the first stage starts: an assembled checkpoint, or the parts to assemble."""

    checkpoint: str | None = None
    """LLaVA-NeXT folder or Hub id (`OWNER/NAME`, `OWNER/NAME@REVISION`); or give the two parts below."""
    vision_tower: str | None = None
    """CLIP, SigLIP or DINOv2, or a LLaVA checkpoint whose tower is taken."""
    language_model: str | None = None
    """Llama with its tokenizer."""
    projector: str | None = None
    """Checkpoint to take the projector from; default: a fresh one, N(0, 0.02)."""
    vision_feature_layer: int = -2
    """Layer of the tower whose output the projector gets; -2 is the second to last."""
    image_grid_pinpoints: list[list[PositiveInt]] | None = None
    """(height, width) in pixels; default: LLaVA-1.6's five shapes in units of the tile."""
    max_tiles: Annotated[int, Field(ge=2, le=64)] | None = None
    """Use every grid shape with at most this many tiles, e.g. for documents; replaces image_grid_pinpoints."""
    add_chat_tokens: bool = False
    """Give a tokenizer that lacks them Llama 3.1's turn tokens, as new rows of the embedding."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type in which the base is assembled and the finished model is written."""
    license: str | None = None
    """Licence of the language model, which the finished model inherits, as the Hub names it."""
    vision_tower_license: str | None = None
    """Licence of the vision tower, as the Hub names it."""

    _present_keys = model_validator(mode="before")(with_present_keys)

    @model_validator(mode="after")
    def _one_origin(self) -> "Model":
        parts = self.vision_tower is not None and self.language_model is not None
        if (self.checkpoint is not None) == parts:
            raise ValueError(
                "the model's origin is unclear (fix: give either checkpoint, or both vision_tower and language_model)"
            )
        if self.max_tiles is not None and self.image_grid_pinpoints is not None:
            raise ValueError("max_tiles and image_grid_pinpoints both name the grid (fix: remove one of the two)")
        return self


class LoraGroup(_Frozen):
    """Low-rank adapters on all linear layers of the tower or the projector, in place of training their weights."""

    r: PositiveInt
    """Rank of the adapters."""
    alpha: PositiveFloat
    """Scale; adapters are multiplied by alpha / r."""


class Lora(_Frozen):
    """Low-rank adapters (Hu et al., 2021) through PEFT: on the language model, and on the groups that it names."""

    r: PositiveInt = 64
    """Rank of the language model's adapters."""
    alpha: PositiveFloat = 128.0
    """Scale of the language model's adapters; they are multiplied by alpha / r."""
    dropout: Fraction = 0.0
    """Share of the adapters' inputs that is dropped in training."""
    targets: list[LoraTarget] = Field(list(get_args(LoraTarget)), min_length=1)
    """Linear layers of the language model that are adapted."""
    dora: bool = False
    """Also learn the magnitude of each output (Liu et al., 2024)."""
    quantize: Literal["nf4"] | None = None
    """Keep the language model's weights in 4 bits while the adapters are trained (QLoRA, through bitsandbytes)."""
    vision_tower: LoraGroup | None = None
    """Adapters on the tower, up to the layer that is read; default: a trainable tower is trained whole."""
    multi_modal_projector: LoraGroup | None = None
    """Adapters on the projector, with `image_newline` frozen; default: a trainable projector is trained whole."""


class Stage(_Frozen):
    """What is trained, on what data, from what weights; lengths in tokens, batches in samples."""

    trainable: list[ModuleGroup] = Field(min_length=1)
    """`multi_modal_projector` includes `image_newline`, `language_model` the head; the rest is frozen."""
    learning_rate: PositiveFloat | dict[ModuleGroup, PositiveFloat]
    """One number, or one for each trainable group."""
    data: list[DataSource] = Field(min_length=1)
    """Sources whose rows are trained on together."""
    global_batch: PositiveInt
    """Samples of one optimizer step, over all devices and accumulation."""
    batch_by: Literal["samples", "supervised_tokens"] = "samples"
    """A fixed number of samples per step; or the same number of steps, balanced by supervised tokens."""
    micro_batch: PositiveInt = 1
    """Samples in one forward pass of one device."""
    epochs: PositiveFloat | None = None
    """Length in passes over the data; or give `max_steps`."""
    max_steps: PositiveInt | None = None
    """Length in optimizer steps."""
    last_batch: Literal["keep", "drop"] = "keep"
    """What to do with an epoch's incomplete last batch."""
    group_by_length: bool = False
    """Batch samples of similar length within shuffled windows of 64 batches, for rows that are not packed."""
    packing: bool = True
    """One row of whole samples per micro-batch, without padding; the loss is the same."""
    share_prefix: PositiveInt = 8
    """Group up to this many conversations about one image, which is then computed once; 1: no groups."""
    max_row_tokens: PositiveInt | None = None
    """Longest packed row, and so the longest record; micro_batch becomes the largest that fits."""
    init_from: str = "previous"
    """`previous` (the previous stage, or `model` for the first stage) or a checkpoint."""
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Schedule of the learning rates after the warm-up."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps in which the learning rates rise from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay; norms and biases are not decayed."""
    adam_beta1: Fraction = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: Fraction = 0.999
    """Decay of AdamW's second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to AdamW's denominator."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients with a larger norm are scaled down to it."""
    precision: Literal["float32", "bfloat16", "bfloat16-weights"] = "bfloat16"
    """float32; bfloat16 autocast over float32 weights; or weights, gradients and optimizer in bfloat16 as well."""
    optimizer: Literal["adamw", "adamw_8bit", "adamw_bf16"] = "adamw"
    """Fused AdamW; with 8-bit moments (torchao or bitsandbytes); or with bfloat16 ones, rounded stochastically."""
    compile: bool = False
    """torch.compile for norms, projections and MLPs of the language model on packed rows."""
    fp8: bool = False
    """float8 products in the language model's layers (torchao), on GPUs that have them."""
    activation_checkpointing: bool | PositiveInt | Literal["selective"] = False
    """Recompute activations in the backward pass; N: of every Nth layer; selective: only what needs no product."""
    deterministic: bool = False
    """Use only algorithms that give the same bits each time: slower on a GPU, where atomic sums otherwise differ."""
    lora: Lora | None = None
    """Train low-rank adapters on the language model, and on groups named here; they are merged at the stage's end."""
    deepspeed: str | None = None
    """A DeepSpeed JSON file, or the name of a shipped one."""
    max_text_tokens: PositiveInt | None = None
    """Longest row, image placeholders not counted."""
    max_tokens: PositiveInt | None = None
    """Longest row, image placeholders counted."""
    on_bad_record: dict[str, Policy] = {"default": "error"}
    """Policy per reject reason (`llava-llama31 check-data` lists them) and `default`."""
    contamination: Contamination | None = None
    """Look for an evaluation's images and questions in the data."""
    validation_fraction: Fraction = 0.0
    """Share of the rows that is held out for the validation loss."""
    eval_steps: PositiveInt | None = None
    """Steps between evaluations."""
    eval_questions: PositiveInt | dict[str, PositiveInt] | None = None
    """How many questions of the recipe's first evaluation to ask at every `eval_steps`, or of each one by its name."""
    keep: Literal["last", "best_loss", "best_accuracy"] = "last"
    """The weights that the stage ends with: its last, or those of the evaluation with the best metric."""
    stop_on_plateau: PositiveInt | None = None
    """End the stage after this many evaluations in a row without a better one (by `keep`, else validation loss)."""
    save_steps: PositiveInt = 200
    """Steps between checkpoints."""
    save_total_limit: PositiveInt = 2
    """Checkpoints to keep; the best one is kept too."""
    logging_steps: PositiveInt = 10
    """Steps between lines of the log."""
    dataloader_workers: Annotated[int, Field(ge=0)] = 2
    """Processes per device that read images and cut tiles."""
    device_tiles: bool = False
    """Resize images and cut their tiles on the training device, bit-identical to Pillow in the workers."""
    feature_cache_gb: PositiveFloat | None = None
    """Quota (10^9 bytes, per machine) for features of the frozen vision tower kept on disk; default: none are kept."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do with a step whose loss or gradient norm is not finite; a skipped step changes no weight."""
    on_spike: Literal["warn", "skip", "stop"] = "warn"
    """What to do with a step whose loss or norm exceeds mean + 6 sigma of the 128 steps before it."""
    step_timeout: PositiveFloat = 3600.0
    """Seconds that a process may spend on a micro-batch, a save or an evaluation batch before it is ended."""
    loader_timeout: Annotated[float, Field(ge=0)] = 600.0
    """Seconds that a data worker may take for a micro-batch; 0: no limit."""
    quirks: list[Literal["frozen_image_newline", "double_newline_after_image", "decay_all_parameters"]] = []
    """Named departures of the model card's commands from what a reader would expect."""
    trainer_args: dict[str, Any] = {}
    """Further fields of Transformers' TrainingArguments; those that the stage owns are refused."""

    @field_validator("trainer_args")
    @classmethod
    def _finite(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for key, value in _numbers(arguments):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key} is {value} (fix: give a finite number)")
        return arguments

    @model_validator(mode="after")
    def _consistent(self) -> "Stage":
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("the stage's length is not clear (fix: give exactly one of epochs and max_steps)")
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch} "
                f"(fix: use a micro_batch that divides it)"
            )
        if self.packing and self.group_by_length:
            raise ValueError("packed rows have no padding (fix: remove group_by_length, or set packing: false)")
        if self.batch_by == "supervised_tokens" and not self.packing:
            raise ValueError("batches of equal tokens need packed rows (fix: set packing: true, or batch_by: samples)")
        if self.max_row_tokens is not None and not self.packing:
            raise ValueError("max_row_tokens is a limit of packed rows (fix: remove it, or set packing: true)")
        if isinstance(self.learning_rate, dict) and set(self.learning_rate) != set(self.trainable):
            raise ValueError(
                f"learning_rate names {sorted(self.learning_rate)} but trainable names {sorted(self.trainable)} "
                f"(fix: give each trainable group its rate, or one rate for all)"
            )
        if len(set(self.trainable)) < len(self.trainable):
            raise ValueError(f"trainable names a group twice: {self.trainable} (fix: name it once)")
        if self.feature_cache_gb is not None:
            self._check_feature_cache()
        self._check_device_options()
        if self.lora is not None:
            self._check_lora(self.lora)
        self._check_evaluations()
        names = [source.name for source in self.data]
        if len(set(names)) < len(names):
            raise ValueError(f"data names a source twice: {names} (fix: rename one)")
        return self

    def _check_lora(self, lora: Lora) -> None:
        if lora.quantize and (self.deepspeed is not None or self.compile):
            key = "compile" if self.compile else "deepspeed"
            raise ValueError(
                f"quantized weights under {key} are not supported yet (fix: remove {key} or lora.quantize)"
            )
        for group, wanted in (
            ("vision_tower", lora.vision_tower),
            ("multi_modal_projector", lora.multi_modal_projector),
        ):
            if wanted is not None and group not in self.trainable:
                fix = f"add {group} to trainable, or remove lora.{group}"
                raise ValueError(f"lora.{group} adapts a group that is frozen (fix: {fix})")
        if not self.adapted:
            raise ValueError(
                "lora adapts the language_model, which is frozen (fix: add language_model to trainable, name another "
                "trainable group in lora, or remove lora)"
            )
        if lora.quantize and "language_model" not in self.adapted:
            raise ValueError(
                "lora.quantize is for a language_model under adapters, and it is frozen (fix: add language_model to "
                "trainable, or remove lora.quantize)"
            )

    def _check_feature_cache(self) -> None:
        if "vision_tower" in self.trainable:
            raise ValueError("features of a trained vision_tower change (fix: remove feature_cache_gb, or freeze it)")
        if not self.packing:
            raise ValueError("feature_cache_gb is for packed rows (fix: remove it, or set packing: true)")
        if self.device_tiles:
            raise ValueError("stored features make device_tiles pointless (fix: remove device_tiles)")
        if self.deepspeed is not None:
            raise ValueError("feature_cache_gb under DeepSpeed is not supported yet (fix: remove one of the two)")

    def _check_device_options(self) -> None:
        asked = {"optimizer": self.optimizer != "adamw", "compile": self.compile, "fp8": self.fp8}
        if self.deepspeed is not None and any(asked.values()):
            key = next(key for key, is_asked in asked.items() if is_asked)
            raise ValueError(f"{key} under DeepSpeed is not supported yet (fix: remove deepspeed or {key})")
        if self.deepspeed is not None and self.precision == "bfloat16-weights":
            raise ValueError("DeepSpeed keeps trained weights in float32 (fix: set precision: bfloat16)")
        if self.compile and not self.packing:
            raise ValueError("compile is for packed rows (fix: set compile: false, or packing: true)")
        if self.activation_checkpointing == "selective" and (self.compile or not self.packing):
            other = "compile: false" if self.compile else "packing: true"
            what = "is for packed rows" if not self.packing else "under compile keeps what the compiler chooses"
            raise ValueError(f"activation_checkpointing: selective {what} (fix: set {other}, or true)")
        if self.deepspeed is not None and (self.on_nonfinite == "skip" or self.on_spike == "skip"):
            key = "on_nonfinite" if self.on_nonfinite == "skip" else "on_spike"
            raise ValueError(
                f"DeepSpeed takes its step before it can be inspected, so {key} can't be skip (fix: set {key}: stop)"
            )
        if not self.fp8:
            return
        if not self.compile:
            raise ValueError("fp8 without compile is slower than bfloat16 (fix: set compile: true)")
        if self.precision == "float32":
            raise ValueError("fp8 products and a float32 stage contradict each other (fix: set precision: bfloat16)")
        if self.lora is not None:
            raise ValueError("fp8 under lora is not supported yet (fix: remove fp8 or lora)")

    def _check_evaluations(self) -> None:
        if self.eval_questions is not None and self.eval_steps is None:
            raise ValueError("eval_questions are never asked (fix: set eval_steps)")
        if self.eval_steps is not None and self.validation_fraction == 0 and self.eval_questions is None:
            raise ValueError(
                "eval_steps has nothing to evaluate (fix: set validation_fraction above 0, or eval_questions)"
            )
        if self.stop_on_plateau is not None and self.eval_steps is None:
            raise ValueError("stop_on_plateau compares evaluations (fix: set eval_steps)")
        if self.keep == "last":
            return
        needed = {"best_loss": "validation_fraction", "best_accuracy": "eval_questions"}[self.keep]
        if self.eval_steps is None or not (
            self.validation_fraction if self.keep == "best_loss" else self.eval_questions
        ):
            raise ValueError(f"keep: {self.keep} compares evaluations (fix: set eval_steps and {needed})")
        if self.eval_steps % self.save_steps:
            raise ValueError(
                f"eval_steps {self.eval_steps} is not a multiple of save_steps {self.save_steps}, so the best "
                f"evaluation may have no checkpoint (fix: set save_steps to {self.eval_steps} or a part of it)"
            )

    @property
    def adapted(self) -> tuple[ModuleGroup, ...]:
        """The trainable groups that are trained by adapters, in place of their own weights."""
        if self.lora is None:
            return ()
        has = {
            "vision_tower": self.lora.vision_tower is not None,
            "multi_modal_projector": self.lora.multi_modal_projector is not None,
            "language_model": True,
        }
        return tuple(group for group in get_args(ModuleGroup) if group in self.trainable and has[group])

    @property
    def recomputed(self) -> "Recomputed":
        """`activation_checkpointing` as a number, 0 for none and 1 for all layers, or `selective`."""
        asked = self.activation_checkpointing
        return "selective" if isinstance(asked, str) else int(asked)

    def learning_rates(self) -> dict[str, float]:
        """Learning rate of each trainable group."""
        if isinstance(self.learning_rate, dict):
            return {group: self.learning_rate[group] for group in self.trainable}
        return dict.fromkeys(self.trainable, self.learning_rate)


class Evaluation(_Frozen):
    """Questions on which the finished model is scored: TextVQA-format ones, or those of a task."""

    task: str | None = None
    """A shipped task, or a file of your own: YAML, or a table of questions; default: TextVQA's protocols."""
    data: str | None = None
    """File or folder of the questions; a file of your own may name it."""
    image_root: str | None = None
    """Folder of the images; default: the folder of `data`."""
    max_pixels: PositiveInt | None = None
    """Largest image that is read, height x width; default: 40 million."""
    name: str = "validation"
    """What it is called in reports and in `eval_questions`; default for a task: the task's name."""
    limit: PositiveInt | None = None
    """Ask only the first N questions."""
    preset: Literal["card", "llava", "lmms-eval", "vlmevalkit"] = "card"
    """Whose prompt to use, see docs/evaluation.md."""
    batch_size: PositiveInt | None = None
    """Questions answered at once; default: by the device's memory."""
    max_new_tokens: PositiveInt | None = None
    """Length at which an answer is cut; default: 64, or the task's."""
    baselines: bool = False
    """Also score the untrained model, and the trained one with images shuffled between questions."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_tasks(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        task = content.get("task")
        if isinstance(task, str):
            return {"name": PurePath(task).stem, **content}
        return {"max_new_tokens": 64, **content}

    @model_validator(mode="after")
    def _has_questions(self) -> "Evaluation":
        if self.task is None and self.data is None:
            raise ValueError("there are no questions (fix: give data, a file of questions)")
        if self.task is None and self.preset == "vlmevalkit":
            raise ValueError("vlmevalkit's prompt for TextVQA is that of card (fix: set preset: card)")
        return self


def _number_of_evaluations(content: Any) -> str:
    return "list[Evaluation]" if isinstance(content, list | tuple) else "mapping[Evaluation]"


Evaluations = Annotated[
    Annotated[Evaluation, Tag("mapping[Evaluation]")]
    | Annotated[list[Evaluation], Tag("list[Evaluation]"), Field(min_length=1)],
    Discriminator(_number_of_evaluations),
]


class TextQuestions(_Frozen):
    """Text-only questions asked before the first and after each stage: how training changes the language model."""

    data: str
    """A table (JSON lines, JSON, CSV, TSV, xlsx): question, answer, metric; optional id, group, options A, B, ..."""
    limit: PositiveInt | None = None
    """Ask only the first N questions."""
    max_new_tokens: PositiveInt = 64
    """Longest answer, in tokens."""
    batch_size: PositiveInt | None = None
    """Questions answered at once; default: by the device's memory."""
    max_drop: Annotated[float, Field(ge=0, le=1)] | None = None
    """Accuracy that a run may lose; if it loses more, it stops after the stage; default: no limit."""


class Publish(_Frozen):
    """Where the model goes on the Hub; the token stays in the environment."""

    repo_id: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """OWNER/NAME; the name of a model made from Llama begins with Llama."""
    private: bool = False
    """Keep the repository private. A new one is private until the model has passed the gate."""
    collection: str | None = None
    """Slug of a collection to add it to."""
    hub_strategy: Literal["end", "every_save", "checkpoint"] = "end"
    """`every_save` also pushes each save as a revision that opens, `checkpoint` with its training state too."""


class Recipe(_Frozen):
    """Everything about a run; see `trainer/recipes/` for complete ones."""

    name: str
    """Name of the run, its model card and its trackers."""
    description: str = ""
    """One line, for `llava-llama31 recipes`."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of all random choices: rows, their order, fresh weights, dropout."""
    prepare: Literal["tiny", "tiny-siglip", "smol"] | None = None
    """Parts and data to make first: the run makes `tiny` and `tiny-siglip`, examples/prepare_smol.py makes `smol`."""
    model: Model
    """The model that the first stage starts from."""
    stages: dict[str, Stage] = Field(min_length=1)
    """The stages by name, in the order of training."""
    evaluation: Evaluations | None = None
    """What the finished model is scored on: one set of questions, or a list of them."""
    text_questions: TextQuestions | None = None
    """Text-only questions that show what training does to the language model."""
    publish: Publish | None = None
    """Where the finished model is published."""
    report_to: list[str] = []
    """Trackers of all stages, as TrainingArguments names them, e.g. tensorboard; each stage is a run of its own."""
    device_watts: PositiveFloat | None = None
    """Measured mean power of one device in training; the model card's energy is computed from it."""

    @model_validator(mode="before")
    @classmethod
    def _no_credentials(cls, content: Any) -> Any:
        for place in _credentials(content):
            raise ValueError(
                f"{place} holds a token or a password, and a recipe is written into its run and its card "
                "(fix: take it out and change it; log in with `hf auth login`, or set HF_TOKEN in the environment)"
            )
        return content

    @model_validator(mode="after")
    def _names(self) -> "Recipe":
        for name in self.stages:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(f"{name!r} is not a name for a stage (fix: use letters, digits, - and _)")
        names = [spec.name for spec in self.evaluations]
        for name, stage in self.stages.items():
            if stage.eval_questions is not None and not names:
                raise ValueError(f"stage {name} has eval_questions, but there is no evaluation (fix: add one)")
            asked = stage.eval_questions if isinstance(stage.eval_questions, dict) else {}
            for unknown in [key for key in asked if key not in names]:
                raise ValueError(
                    f"stage {name} has eval_questions of {unknown!r} (fix: name evaluations: {', '.join(names)})"
                )
        slugs = [slug(each) for each in names]
        for number, each in enumerate(slugs):
            if each in slugs[:number]:
                raise ValueError(f"two evaluations are called {names[number]!r} (fix: give one another name)")
        if sum(spec.task is None for spec in self.evaluations) > 1:
            raise ValueError("two evaluations have no task (fix: give one of them task: textvqa)")
        return self

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """What the finished model is scored on, in the order of the recipe."""
        if self.evaluation is None:
            return ()
        return tuple(self.evaluation) if isinstance(self.evaluation, list) else (self.evaluation,)

    def where_evaluation(self, number: int) -> str:
        """The key of an evaluation, as `--set` names it."""
        return f"evaluation.{number}" if isinstance(self.evaluation, list) else "evaluation"


def slug(name: str) -> str:
    """A name reduced to characters that are safe in file names and keys."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "evaluation"


def _numbers(content: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """(key, value) of every number in nested mappings and lists."""
    if isinstance(content, int | float):
        yield key, content
    elif isinstance(content, dict | list):
        for name, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _numbers(value, f"{key}.{name}" if key else str(name))


def _credentials(content: Any, key: str = "the recipe") -> Iterator[str]:
    """The keys under which a recipe holds secrets."""
    if isinstance(content, dict):
        for name, value in content.items():
            if holds_credential(str(name)):
                yield f"a key of {key}"
            elif value and name in _TOKEN_FIELDS:
                yield f"{key}: {name}"
            else:
                yield from _credentials(value, f"{key}: {name}" if key == "the recipe" else f"{key}.{name}")
    elif isinstance(content, list | tuple):
        for number, item in enumerate(content):
            yield from _credentials(item, f"{key}.{number}")
    elif isinstance(content, str) and holds_credential(content):
        yield key
