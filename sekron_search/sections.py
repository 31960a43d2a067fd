"""The sections of a configuration: every key, its default, what it may be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from sekron_search.divergence import ChosenBy, DivergenceName
from sekron_search.precision import Autocast, device_name, known_device
from sekron_search.references import Reference, name_or_reference
from sekron_search.runtimes.base import MemoryFormat
from sekron_search.runtimes.registry import RUNTIMES
from sekron_search.search.budget import Budget

MetricName = Literal["accuracy", "neg_mse", "psnr"]
LossName = Literal["auto", "l1"]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every generator takes

#: A device by the name that torch has for it.
Device = Annotated[str, AfterValidator(known_device)]
#: A metric by name, or a function of (network, dataset) that returns a number, higher is better.
Metric = Annotated[str, name_or_reference(*get_args(MetricName))]
#: A loss by name, or a function of (output, target) that returns a scalar tensor.
Loss = Annotated[str, name_or_reference(*get_args(LossName))]
#: A runtime by name, or a subclass of `Runtime`.
RuntimeChoice = Annotated[str, name_or_reference(*RUNTIMES, what="class")]


class Section(BaseModel):
    """A part of a configuration: no key but its own, no number but finite ones; never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Where the trained network comes from.

    Args:
        factory: `package.module:function` that returns the network.
        kwargs: Arguments of the factory.
        weights: File of its state dict (safetensors, or a torch file that loads with `weights_only=True`).
    """

    factory: Reference
    kwargs: dict[str, Any] = {}
    weights: Path | None = None


class DataConfig(Section):
    """Where the data comes from: exactly one of `source: digits`, `folder` with a path, `factory`.

    Args:
        source: "digits" (scikit-learn's), "folder" (images, a directory per class) or "factory".
        path: Of the folder; with sub-folders train, validation and test, or classes only, which are then split.
        factory: `package.module:function` that returns a `sekron_search.data.DataBundle`.
        kwargs: Arguments of the factory.
        image_size: (height, width) to which images of a folder are resized; by default the size that they all have.
        mean, std: Per channel, by which inputs in [0, 1] are normalised.
        validation_fraction, test_fraction: Of the images, where the folder has no such splits.
    """

    source: Literal["digits", "folder", "factory"]
    path: Path | None = None
    factory: Reference | None = None
    kwargs: dict[str, Any] = {}
    image_size: tuple[Positive, Positive] | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[Annotated[float, Field(gt=0)], ...] = (0.229, 0.224, 0.225)
    validation_fraction: Annotated[float, Field(gt=0, lt=0.9)] = 0.15
    test_fraction: Annotated[float, Field(gt=0, lt=0.9)] = 0.2

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        needed = {"folder": "path", "factory": "factory"}.get(self.source)
        if needed and getattr(self, needed) is None:
            raise ValueError(f"source '{self.source}' needs the key '{needed}'")
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels, std {len(self.std)}")
        return self


class CalibrationConfig(Section):
    """How fits are made data-aware.

    Args:
        samples: Unlabelled training samples on which layers are fitted.
        holdout: Further ones on which the divergence of assembled networks is measured.
        batch_size: Of both.
        refine_steps: L-BFGS steps of every option of every layer.
        curvature: Whether an error of a layer's output counts by how much it changes the network's own output, which
            takes gradients of the network; else all errors of a layer's output count alike.
        sequential_steps: L-BFGS steps of every layer when a candidate is fitted again, layer after layer, to the
            original's outputs on the inputs that the compressed network really produces; 0 leaves that out.
    """

    samples: Positive = 512
    holdout: Positive = 512
    batch_size: Positive = 128
    refine_steps: NonNegative = 40
    curvature: bool = True
    sequential_steps: NonNegative = 40


class SearchConfig(Section):
    """The search over whole networks.

    Args:
        trials: Networks that are tried.
        generation: Trials that are drawn from the same earlier ones: so many workers can share them.
        spread: Share of the trials that look for the front beside the budget.
        time_limit_s: Seconds of trials after which the best so far is gone on with; what comes before is not limited.
        leanings: Exponents, each of one of the last trials, in which errors count times (weights per flop)^leaning: the
            ones above 0 favour small maps. These networks are fitted layer after layer beside the best ones.
        divergence: By what outputs are compared: "kl" for logits of classes, else "mse".
    """

    trials: Positive = 40
    generation: Positive = 4
    spread: Annotated[float, Field(ge=0, le=1)] = 0.25
    time_limit_s: Annotated[float, Field(gt=0)] | None = None
    leanings: tuple[Annotated[float, Field(ge=-4, le=4)], ...] = ()
    divergence: DivergenceName = "kl"


class LatencyConfig(Section):
    """How latency is measured: of networks as they are deployed, through the runtime that will run them.

    Args:
        batch_size: Samples of the example batch, on which latency and peak memory are meant.
        runtime: "pytorch-eager", "torch-compile", "onnxruntime", "openvino", or `package.module:Class` of a subclass of
            `sekron_search.runtimes.base.Runtime`.
        num_threads: Intra-operator threads; if not given as torch has it, and as a run's latencies were measured with
            when it is gone on with.
        memory_format: "contiguous", "channels_last", or "auto": whichever makes the network's options fastest.
        rounds: Interleaved samples of every measurement of a whole network.
        profile: A device profile to use; what it lacks is measured here, or predicted where it is of another device.
        any_profile: Use the profile even if it is of another runtime, memory format or number of threads.
    """

    batch_size: Positive = 1
    runtime: RuntimeChoice = "pytorch-eager"
    num_threads: Positive | None = None
    memory_format: Literal["auto"] | MemoryFormat = "auto"
    rounds: Positive = 21
    profile: Path | None = None
    any_profile: bool = False


class FinetuneConfig(Section):
    """Distillation of the best candidates from the original.

    Args:
        epochs: Of training at most; 0 trains nothing.
        candidates: How many of the networks that diverge least, once fitted, are trained, with successive halving.
        batch_size: Of training.
        weight_decay: By how much of itself, times the learning rate, a trained number shrinks with every step.
        optimizer: "muon" changes matrices as much in all directions, "adamw" every number by itself.
        learning_rate: Its highest, between warm-up and cosine; "auto" finds it in at most a third of the time.
        accumulate: Batches whose gradients are averaged for one step, where more do not fit in memory at a time.
        temperature: Of the distillation, for "kl".
        mirrored_teacher: Whether networks are trained to give the mean of what the original gives for images and for
            their mirror images, which is better than either where left and right do not matter; it takes another pass.
        loss: Of the outputs: "auto" compares logits by divergence and labels by cross-entropy, other outputs by squared
            errors; "l1" compares these by absolute ones; a function of (output, target), `package.module:function`,
            replaces what the targets are compared by.
        label_weight: Weight of the targets' loss; the original's outputs get the rest.
        layer_weight: Weight at the start of the error of replaced layers' outputs; it falls to 0 like a cosine.
        batch_norm: "frozen" trains scale and shift, and keeps statistics as they will run; "trained" takes batches';
            "auto" trains them where a network starts far from the original, by the divergence of their outputs.
        choice: By what the best of several networks, and a trained one or the same as it was fitted, are told apart:
            "metric", or where chance may have put it lower the divergence from what is learned, on the validation
            data; or that "divergence" alone, for validation data that the original was trained on: it knows them by
            heart, so that their labels say how much of that is left. Halving goes by the same.
        device: Where is trained, by default where the run is: a network for a CPU can be trained on a GPU, also when
            the run is gone on with on another machine. It has to be there when there is something to train.
        autocast: What passes are computed in, losses scaled for float16; None is float32, "auto" bfloat16 where the
            device computes in it, else float32, which is faster than converting.
    """

    epochs: NonNegative = 3
    candidates: Positive = 2
    batch_size: Positive = 128
    accumulate: Positive = 1
    learning_rate: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    optimizer: Literal["muon", "adamw"] = "muon"
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    temperature: Annotated[float, Field(gt=0)] = 3.0
    mirrored_teacher: bool = False
    loss: Loss = "auto"
    label_weight: Annotated[float, Field(ge=0, le=1)] = 0.1
    layer_weight: Annotated[float, Field(ge=0)] = 4.0
    batch_norm: Literal["auto", "frozen", "trained"] = "auto"
    choice: ChosenBy = "metric"
    device: Annotated[str, AfterValidator(device_name)] | None = None
    autocast: Autocast | None = None


class AuditConfig(Section):
    """How far the proxies can be trusted: random candidates are trained shortly, and ranked.

    Args:
        candidates: How many, over all budgets; 0 leaves the audit out. It takes a training for each.
        budgets: Like the run's, one for every part of the candidates; by default its own, a looser and a tighter one.
        epochs: Of fine-tuning.
        seed: Of the candidates that are drawn.
        proxies: More proxies than those of the package: functions of a `sekron_search.proxies.Subject`, each as
            `package.module:function`; the smaller its number, the better the candidate should be.
    """

    candidates: NonNegative = 0
    budgets: tuple[dict[str, float | str], ...] = ()
    epochs: Positive = 1
    seed: Seed = 0
    proxies: tuple[Reference, ...] = ()

    @field_validator("budgets", mode="before")
    @classmethod
    def _valid_budgets(cls, value: Any) -> Any:
        for item in value if isinstance(value, list | tuple) else ():
            Budget.of(item)
        return value

    @model_validator(mode="after")
    def _enough(self) -> AuditConfig:
        needed = 2 * (len(self.budgets) or 3)
        if 0 < self.candidates < needed:
            raise ValueError(f"candidates is {self.candidates}; expected 0, or two for every budget: at least {needed}")
        return self
