"""TRL's SFTTrainer, led by a plan: its batch is one whole optimizer step, its loss the one whose gradients were taken.

The trainer keeps what is its own: adapters, optimizer and schedule, clipping, mixed precision, several processes, trackers,
checkpoints. Replaced are the order of the examples (plan.py), the loss (loss.py), and the step, so that a step's gradient can
be operated on while it is whole. Importing this module loads trl, which takes seconds: only a run does.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback
from trl import SFTConfig, SFTTrainer

from gradsieve.atomic import write_json
from gradsieve.clock import Progress
from gradsieve.errors import InvalidArgument, ModelError
from gradsieve.train.adapters import lora_config
from gradsieve.train.loss import example_losses
from gradsieve.train.plan import Step, epoch_ends, micro_batches
from gradsieve.train.recipe import Recipe
from gradsieve.train.surgery import OPERATIONS, dot

WHOLE = "spent.json"  # written last into a checkpoint: without it, the checkpoint was cut off
NAMES = "parameters.json"  # names of the trained parameters, in the order of the optimizer's state
# transformers renames the setting in its version 6, and warns of the old name before that
_CHECKPOINTING = "activation_checkpointing" if hasattr(SFTConfig, "activation_checkpointing") else "gradient_checkpointing"
Watch = Callable[[nn.Module, int], None]
"""Is shown the model, all of it on this process, before each step, with the number of the step from 0."""
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass
class Spent:
    """What a run has used so far, over all interruptions.

    Attributes:
        seconds: On the clock, in training steps and checkpoints.
        cpu_seconds: Processor seconds of this process, all threads.
        surgery_seconds: The part of `seconds` that went into the anchor's gradient and the projection.
        watch_seconds: The part of `seconds` in which the model was shown before a step.
        conflicts: Steps whose gradient opposed the anchor's.
        tokens: Tokens trained on, without padding.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    surgery_seconds: float = 0.0
    conflicts: int = 0
    tokens: int = 0
    watch_seconds: float = 0.0


class PlannedTrainer(SFTTrainer):  # type: ignore[misc]
    """An SFTTrainer that takes the steps of a plan."""

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        plan: Sequence[Step],
        recipe: Recipe,
        out: Path,
        progress: Progress,
        spent: Spent,
        name: str,
        logs: Path,
        watch: Watch | None = None,
    ) -> None:
        self.plan = plan
        self.recipe = recipe
        self.spent = spent
        self.watch = watch
        self.lengths = [len(ids) for ids in data["input_ids"]]
        super().__init__(
            model=model,
            args=_arguments(recipe, out, len(plan), name),
            train_dataset=data,
            processing_class=_no_tokenizer(),
            data_collator=_no_collator,
            peft_config=lora_config(model, recipe.rank, recipe.alpha, recipe.dropout) if recipe.tuning == "lora" else None,
        )
        self.processing_class = None  # some versions give its missing special tokens to the model
        self.remove_callback(PrinterCallback)
        self.add_callback(_Bookkeeper(self, progress))
        for callback in self.callback_handler.callbacks:  # checkpoints, where it would write, are removed
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(logs)
        if recipe.surgery != "none" and self.accelerator.distributed_type.value not in ("NO", "MULTI_GPU", "MULTI_CPU"):
            raise InvalidArgument(
                f"surgery must be none where weights are sharded ({self.accelerator.distributed_type.value}), "
                f"got {recipe.surgery}; run it on one process or with plain data parallelism"
            )

    # -- the step -------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        """Yields the plan's steps. Every process gets all of each and takes its share itself."""
        return torch.utils.data.DataLoader(list(self.plan), batch_size=1, collate_fn=_only)  # type: ignore[arg-type]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Leaves the gradient of one step in the parameters and returns its loss."""
        del num_items_in_batch  # counts tokens; here examples count
        step: Step = inputs["step"]
        if self.watch is not None:
            self._show(model, self.watch)
        model.train()
        with self.maybe_activation_offload_context:
            loss = self._backward(model, step.rows)
            if step.anchors:
                self._operate(model, step.anchors)
        if not loss.isfinite():
            raise ModelError(
                f"the training loss must be finite, got {loss.item()} at step {self.state.global_step + 1}; "
                f"lower learning_rate ({self.recipe.rate:g})"
            )
        return loss

    def _show(self, model: nn.Module, watch: Watch) -> None:
        """Shows the model with its own forward: accelerate has put mixed precision around it."""
        started = self._now()
        plain = self.accelerator.unwrap_model(model)
        wrapped = plain.forward
        if own := vars(plain).get("_original_forward"):
            plain.forward = own
        try:
            watch(plain, self.state.global_step)
        finally:
            if own:
                plain.forward = wrapped
        self.spent.watch_seconds += self._now() - started

    def _backward(self, model: nn.Module, rows: Sequence[int]) -> Tensor:
        """Accumulates the gradient of Σ w_i l_i / len(rows) over the processes."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        own = rows[rank::world] or rows[:1]  # a process without examples still has to meet the others
        scale = world / len(rows) if rows[rank::world] else 0.0  # gradients are averaged over processes
        parts = micro_batches(own, self.lengths, self.recipe.micro_batch)
        total = torch.zeros((), device=self.accelerator.device, dtype=torch.float32)
        for number, part in enumerate(parts, 1):
            with nullcontext() if number == len(parts) else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, self._batch(part)) * scale
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Returns the sum of the examples' weighted losses."""
        assert not return_outputs
        assert num_items_in_batch is None
        losses = example_losses(model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
        return (losses * inputs["weights"].to(losses.dtype).to(losses.device)).sum()

    def _batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        columns = self.train_dataset[list(rows)]
        examples = [{"input_ids": i, "labels": l} for i, l in zip(columns["input_ids"], columns["labels"], strict=True)]
        batch = DataCollatorForLanguageModeling(pad_token_id=0)(examples)
        batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        batch["weights"] = torch.tensor(columns["weight"], dtype=torch.float64)
        return batch

    # -- surgery --------------------------------------------------------------------------------------------------------

    def _operate(self, model: nn.Module, anchors: Sequence[int]) -> None:
        """Puts the operated gradient in place of the step's."""
        started = self._now()
        plain = self.accelerator.unwrap_model(model)  # no hooks: the anchor's gradient is not this step's
        parameters = [p for p in plain.parameters() if p.requires_grad and p.grad is not None]
        gradient = [p.grad for p in parameters]
        anchor = self._gradient(plain, parameters, anchors)
        self.spent.conflicts += bool(dot(gradient, anchor) < 0)
        for parameter, operated in zip(parameters, OPERATIONS[self.recipe.surgery](gradient, anchor), strict=True):
            parameter.grad = operated
        self.spent.surgery_seconds += self._now() - started

    def _gradient(self, model: nn.Module, parameters: Sequence[nn.Parameter], rows: Sequence[int]) -> list[Tensor]:
        """Returns the mean gradient of these examples, of which each process takes a share: the same to all, dropout or not."""
        total = [torch.zeros_like(p) for p in parameters]
        own = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        for part in micro_batches(own, self.lengths, self.recipe.micro_batch):
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._batch(part)) / len(rows)
            for tensor, grad in zip(
                total, torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True), strict=True
            ):
                tensor += grad
        return [self.accelerator.reduce(tensor) for tensor in total]

    def _now(self) -> float:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    # -- files ----------------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Writes adapters or weights as safetensors; asks no hub whether embeddings have grown."""
        if not self.args.should_save:
            return
        options = {"save_embedding_layers": False} if self.recipe.tuning == "lora" else {}
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict, **options)

    def parameter_names(self) -> list[str]:
        """Returns the names of the trained parameters in the order of the optimizer's state."""
        names = {id(parameter): name for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters()}
        return [names.get(id(p), "") for group in self.optimizer.param_groups for p in group["params"]]

    def floating_point_ops(self, inputs: Any) -> int:
        """Returns the operations of a step: 6 per parameter and token."""
        tokens = sum(self.lengths[row] for row in inputs["step"].rows)
        return int(6 * tokens * self.accelerator.unwrap_model(self.model).num_parameters(exclude_embeddings=True))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes none: its text would be about TRL's loss."""

    def _send_telemetry(self) -> None:
        """Sends none: a run needs no network."""


class _Bookkeeper(TrainerCallback):  # type: ignore[misc]
    """Counts what a run spends, decides when it saves, and drops the checkpoints that are no longer needed."""

    def __init__(self, trainer: PlannedTrainer, progress: Progress) -> None:
        self.trainer = trainer
        self.progress = progress
        plan, recipe = trainer.plan, trainer.recipe
        every = recipe.save_steps or -(-len(plan) // 10)
        self.kept = set(epoch_ends(plan)) if recipe.save_epochs else set()
        self.saves = self.kept | set(range(every, len(plan), every))
        self.tokens = sum(trainer.lengths[row] for step in plan for row in step.rows)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress("training", self.trainer.spent.tokens, self.tokens)  # before and after: what a step takes without saving

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = self.trainer.plan[state.global_step - 1]
        state.epoch = step.epoch
        self.trainer.spent.tokens += sum(self.trainer.lengths[row] for row in step.rows)
        self._count_time()
        control.should_save = state.global_step in self.saves
        self.progress("training", self.trainer.spent.tokens, self.tokens)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._count_time()
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / NAMES).write_text(json.dumps(self.trainer.parameter_names()))
        write_json(folder / WHOLE, asdict(self.trainer.spent))
        for other in Path(args.output_dir).glob("checkpoint-*"):
            if int(other.name.rpartition("-")[2]) not in {*self.kept, state.global_step}:
                shutil.rmtree(other)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._count_time()

    def _count_time(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.trainer.spent.seconds += wall - self._wall
        self.trainer.spent.cpu_seconds += cpu - self._cpu
        self._wall, self._cpu = wall, cpu


def last_checkpoint(folder: Path) -> tuple[Path, Spent] | None:
    """Returns the newest whole checkpoint below a folder and what had been spent until then; removes those cut off."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        if (path / WHOLE).exists():
            return path, Spent(**json.loads((path / WHOLE).read_text()))
        shutil.rmtree(path, ignore_errors=True)  # several processes may come here at once
    return None


def _arguments(recipe: Recipe, out: Path, steps: int, name: str) -> SFTConfig:
    return SFTConfig(
        output_dir=str(out),
        run_name=name,
        max_steps=steps,
        per_device_train_batch_size=1,  # one step of the plan
        gradient_accumulation_steps=1,
        learning_rate=recipe.rate,
        lr_scheduler_type=_SCHEDULES[recipe.schedule],
        warmup_steps=recipe.warmup,  # below 1: a share, rounded up
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim="adamw_torch",
        bf16=recipe.dtype == "bfloat16",
        use_cpu=recipe.device == "cpu",
        **{_CHECKPOINTING: recipe.gradient_checkpointing},
        seed=recipe.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",  # the bookkeeper says when
        report_to=list(recipe.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        max_length=None,  # tokens come truncated as they were when gradients were taken
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},  # no template, no labels of its own
    )


def _no_tokenizer() -> PreTrainedTokenizerFast:
    """Returns an empty tokenizer: the trainer insists on one, or looks for the model's on the hub."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"": 0}, unk_token="")))


def _no_collator(examples: Any) -> Any:
    raise AssertionError("batches are made of the plan's steps")


def _only(items: list[Step]) -> dict[str, Step]:
    return {"step": items[0]}  # trainers look into batches by name
