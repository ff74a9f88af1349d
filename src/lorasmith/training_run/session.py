"""One start of a run: the loop, and what is written on the way."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from lorasmith import config
from lorasmith.best_steps import Losses, best_steps, has_stalled
from lorasmith.cache_folder import Store
from lorasmith.caching import (
    Encoded,
)
from lorasmith.checkpoint import atomic_file
from lorasmith.command_line import quoted
from lorasmith.config import TrainConfig
from lorasmith.data.dataset import Dataset
from lorasmith.errors import UserError
from lorasmith.foreign_network import AnyNetwork
from lorasmith.formats import kohya
from lorasmith.hub import upload
from lorasmith.interrupt import StopRequest
from lorasmith.judging import Bench
from lorasmith.loss_log import LossLog, read_log
from lorasmith.memory import lent
from lorasmith.model_card import write_card
from lorasmith.models.base import LatentDiffusion
from lorasmith.optimizers.base import adaptation, weights_to_use
from lorasmith.output_folder import RUN_FILE, move_aside
from lorasmith.processes import Processes
from lorasmith.progress import Progress
from lorasmith.report import ReportContents, write_report
from lorasmith.samples_folder import SamplesFolder
from lorasmith.sampling import generate
from lorasmith.trackers import Trackers
from lorasmith.training import LossNotFiniteError, Stepper
from lorasmith.training_run.about import file_advice, file_metadata, now
from lorasmith.training_run.preparation import Preparation, output_folder
from lorasmith.training_run.rates import rate_curves
from lorasmith.training_run.resuming import OF_ONE_START, with_whole_paths
from lorasmith.training_run.scoring import SampleScores
from lorasmith.training_run.sharing import model_card_of, run_id, shared_options
from lorasmith.training_run.uploading import RunUploads, target_of
from lorasmith.training_state import (
    NETWORK_FILE,
    StateFacts,
    list_states,
    save_state,
    step_of,
)
from lorasmith.validation import Validation, short_names, validate
from lorasmith.weight_average import WeightAverage

_STOPPING = "stopping after this step, then saving; once more ends at once, without saving"


class Session:
    """One start of a run: the loop and what is written on the way. Process 0 alone prints and writes."""

    def __init__(
        self,
        cfg: TrainConfig,
        ready: Preparation,
        processes: Processes,
        model: LatentDiffusion,
        network: AnyNetwork,
        optimizer: torch.optim.Optimizer,
        stepper: Stepper,
        average: WeightAverage | None,
        stores: Mapping[Encoded, Store],
        bench: Bench | None,
    ) -> None:
        self.cfg, self.ready, self.processes, self.model = cfg, ready, processes, model
        self.network, self.optimizer, self.stepper, self.stores = network, optimizer, stepper, stores
        self.average, self.bench = average, bench
        self.folder, self.state = output_folder(cfg), ready.state
        self.started_at = now() if self.state is None else self.state.facts.started_at
        self.done = 0 if self.state is None else self.state.facts.step
        self.losses: LossLog | None = None
        self.validation_losses: LossLog | None = None
        self.has_stalled = False  # whether what is measured became better too long ago
        self.samples: SamplesFolder | None = None
        self.scores: SampleScores | None = None
        self.trackers: Trackers | None = None
        self.uploads: RunUploads | None = None

    def run(self, dataset: Dataset) -> int:
        """Train; return the exit code."""
        together, is_main = self.processes.together, self.processes.is_main
        with ExitStack() as stack:
            for store in self.stores.values():
                stack.callback(store.flush)
            with together():
                if is_main:
                    self._open_folder(stack)
                if self.done == 0 and (self.cfg.samples.before_after or self.cfg.samples.at_first):
                    self._draw()
            if self.done == 0 or self._is_validation_due():  # maybe stopped before it could be measured
                self._validate(dataset)
            with together():
                if self.state is not None:
                    self._catch_up()
            self._agree_on_stalling()
            stop = stack.enter_context(StopRequest(_STOPPING if is_main else ""))
            try:
                is_stopped = self._loop(dataset, stop)
            except LossNotFiniteError as error:
                raise LossNotFiniteError(f"{error}{self._way_on()}") from error
            if is_stopped:
                with together():  # a launcher ends the others as soon as one has ended, but process 0 is saving
                    return self._leave(stop)
            with together():
                self._finish()
        return 0

    def _loop(self, dataset: Dataset, stop: StopRequest) -> bool:
        """Take steps to the end, or until any process was asked to stop; return whether that was so."""
        total, processes = self.ready.total_steps, self.processes
        is_shown = self.cfg.log.progress and processes.is_main
        with Progress(total, self.done, processes.device, is_shown=is_shown) as progress:
            prepared = dataset.prefetch(range(self.done, total), processes.index, self.cfg.data.workers)
            while self.done < total and not self.has_stalled:
                with processes.together():
                    batches = next(prepared)
                rate = self.ready.schedule.multiplier(self.done)
                result = self.stepper.step(batches, rate, step=self.done, stop_signal=lambda: stop.signal_number)
                self.done += 1
                if self.average is not None:
                    self.average.update(self.done)
                with processes.together():
                    if processes.is_main:
                        self._log(result.loss, rate, result.num_limited)
                    progress.advance(result.loss)
                if result.stop_signal is None and self._is_validation_due():
                    progress.say(self._validate(dataset))
                with processes.together():
                    if result.stop_signal is None:
                        self._save_and_draw_when_due(progress.say)
                self._agree_on_stalling()
                if result.stop_signal is not None:
                    stop.signal_number = result.stop_signal  # maybe another process's
                    return self.done < total
        return False

    @contextmanager
    def _as_saved(self) -> Iterator[None]:
        """While entered, the network holds the weights that are saved, drawn with and validated; nothing is compiled.

        Code for the shapes of samples would take minutes to make.
        """
        with (
            torch.compiler.set_stance("force_eager") if self.cfg.training.compile else nullcontext(),
            weights_to_use(self.optimizer) if self.average is None else self.average.in_place(),
        ):
            yield

    def _is_validation_due(self) -> bool:
        if self.ready.validation is None:
            return False
        validation, done = self.cfg.validation, self.done
        periods = [
            validation.validate_every_steps,
            validation.validate_every_epochs and validation.validate_every_epochs * self.ready.plan.steps_per_epoch,
        ]
        if not any(periods):
            periods = [self.ready.plan.steps_per_epoch]
        return done == self.ready.total_steps or any(period and done % period == 0 for period in periods)

    def _validate(self, dataset: Dataset) -> str:
        """Measure and log the loss of the held-out pictures, if there are any; return what to say of it."""
        plan = self.ready.validation
        if plan is None:
            return ""
        with self._as_saved():
            measured = validate(
                self.model, plan, dataset.held_out(plan), self.processes, self.stepper.encode, self.stepper.objective,
                workers=self.cfg.data.workers,
            )  # fmt: skip
        with self.processes.together():
            is_stalled = self._judge(measured) if self.processes.is_main else False
        self.has_stalled = self.processes.sums([float(is_stalled)]) != [0.0]
        return f"held-out pictures after step {self.done}: loss {measured.loss:.4f}"

    def _judge(self, measured: Validation) -> bool:
        """Log the held-out pictures' losses, keep the LoRA if it is one of the best; return whether to stop early."""
        log, options, losses = self.validation_losses, self.cfg.validation, measured.pictures
        assert log is not None
        if self.done not in dict(log.losses):
            names = short_names([self.ready.records[index].path for index in losses])
            log.append(self.done, measured.loss, pictures=dict(zip(names, losses.values(), strict=True)))
            self._track({"loss/validation": measured.loss})
        return options.best_by == "loss" and self._keep_best(log.losses)

    def _judge_samples(self, pictures: Sequence[Image.Image]) -> None:
        """Have the samples scored, where that is asked for, and keep the LoRA if it is one of the best."""
        if self.scores is None:
            return
        found = self.scores.add(self.done, pictures)
        self._track({f"pictures/{name}": value for name, value in found.items()})
        self.has_stalled = self._keep_best(self.scores.losses)

    def _agree_on_stalling(self) -> None:
        """Let all processes know what process 0 has found, which alone draws and judges."""
        if self.ready.judge is not None:
            self.has_stalled = self.processes.sums([float(self.has_stalled)]) != [0.0]

    def _keep_best(self, losses: Losses) -> bool:
        """Keep the LoRA if it is one of the best, and these alone; return whether to stop early."""
        options = self.cfg.validation
        if options.keep_best is not None:
            best = best_steps(losses, options.keep_best)
            if self.done in best:
                self._save_lora(self.folder.best(self.done))
            for step, path in self.folder.saved_best().items():
                if step not in best:
                    path.unlink()
        return options.stop_early is not None and has_stalled(losses, options.stop_early)

    def _way_on(self) -> str:
        """Name the last whole state and the command that goes on from it more carefully; "" if there is none.

        Resuming would come to the same step with the same loss, so it is a new run that starts from these weights.
        """
        states = [state for state in list_states(self.folder.states) if step_of(state) <= self.done]
        if not states:
            return ""
        optimizer, output = self.cfg.optimizer, self.folder.path.resolve()
        rates = {
            "--learning-rate": self.ready.rates.learning_rate,
            "--unet-lr": optimizer.unet_lr,
            "--text-encoder-lr": optimizer.text_encoder_lr,
        }
        words = [
            "lorasmith", "train", "--config", output / RUN_FILE, "--weights", states[-1].resolve() / NETWORK_FILE,
            *(word for flag, rate in rates.items() if rate is not None for word in (flag, f"{rate / 10:g}")),
            "--output", f"{output}-2",
        ]  # fmt: skip
        return (
            f" The last whole state is that of step {step_of(states[-1])}; from there with a tenth of the learning "
            f"rate: {' '.join(map(quoted, words))}"
        )

    def _save_and_draw_when_due(self, say: Callable[[str], None]) -> None:
        save, done = self.cfg.save, self.done
        if done == self.ready.total_steps or self.has_stalled:
            return
        paths = self._due_saves()
        is_state_due = bool(save.state_every_steps) and done % save.state_every_steps == 0
        if self.processes.is_main:
            assert self.uploads is not None
            for path in paths:
                self._save_lora(path)
                say(f"saved {path}")
                self.uploads.take_lora(path)
            self._remove_old_saves()
            if paths or is_state_due:
                self._save_state()
        if self._are_samples_due():
            self._draw()

    def _catch_up(self) -> None:
        """Save and draw what was due after the step that a run goes on from, and was not done before it stopped."""
        is_undrawn = False
        with self.processes.together():
            if self.processes.is_main:
                assert self.samples is not None
                assert self.uploads is not None
                for path in self._due_saves():
                    if not path.exists():
                        self._save_lora(path)
                        self.uploads.take_lora(path)
                if self._are_samples_due():
                    is_undrawn = not self.samples.has(self.done)
                    if not is_undrawn:
                        self._judge_samples(self.samples.pictures(self.done))
        if self.processes.most(int(is_undrawn)):
            self._draw()

    def _due_saves(self) -> list[Path]:
        """Return the LoRAs to save after this step."""
        save, (epoch, steps) = self.cfg.save, divmod(self.done, self.ready.plan.steps_per_epoch)
        every_epochs = self._epochs_between_saves()
        is_epoch_due = every_epochs and steps == 0 and epoch % every_epochs == 0
        is_step_due = save.save_every_steps and self.done % save.save_every_steps == 0
        return [self.folder.epoch(epoch)] * bool(is_epoch_due) + [self.folder.step(self.done)] * bool(is_step_due)

    def _are_samples_due(self) -> bool:
        samples, (epoch, steps) = self.cfg.samples, divmod(self.done, self.ready.plan.steps_per_epoch)
        return bool(samples.sample_every_steps and self.done % samples.sample_every_steps == 0) or bool(
            samples.sample_every_epochs and steps == 0 and epoch % samples.sample_every_epochs == 0
        )

    def _epochs_between_saves(self) -> int | None:
        save = self.cfg.save
        if save.saves is None:
            return save.save_every_epochs
        return max(1, self.ready.total_steps // self.ready.plan.steps_per_epoch // save.saves)

    def _remove_old_saves(self) -> None:
        """Remove the run's LoRAs that --keep-last-epochs and --keep-last-steps do not keep; others are the user's."""
        save, (epoch, steps) = self.cfg.save, divmod(self.done, self.ready.plan.steps_per_epoch)
        old: list[Path] = []
        if save.keep_last_epochs is not None and steps == 0:
            saved = self.folder.saved_epochs()
            old += [saved[number] for number in sorted(n for n in saved if n <= epoch)[: -save.keep_last_epochs]]
        if save.keep_last_steps is not None:
            saved = self.folder.saved_steps()
            old += [path for number, path in saved.items() if number < self.done - save.keep_last_steps]
        for path in old:
            path.unlink()

    def _leave(self, stop: StopRequest) -> int:
        """Save what was reached after a request to stop, and say how to go on."""
        if self.processes.is_main:
            assert self.uploads is not None
            path = self.folder.step(self.done)
            self._save_lora(path)
            self._save_state()
            print(
                f"\nstopped after step {self.done} of {self.ready.total_steps}; saved {path}\n"
                f"to go on: lorasmith train --resume {quoted(self.folder.path)}",
                flush=True,
            )
            self.uploads.take_lora(path)
            self.uploads.finish()
        return stop.exit_code

    def _finish(self) -> None:
        """Save the last LoRA and state, draw, and write the report."""
        path = self.folder.last()
        if self.processes.is_main:
            self._save_lora(path)
            self._save_state()
        if self.cfg.samples.before_after or self._are_samples_due():
            self._draw()
        with self.processes.in_step(), self._as_saved():
            norms = self.network.delta_norms()
        if self.processes.is_main:
            self._conclude(path, norms)

    def _conclude(self, path: Path, norms: Mapping[str, float]) -> None:
        """Write the report, and tell where everything is."""
        page = write_report(self.folder.report, self._report(path, norms))
        if self.has_stalled:
            print(
                f"\nstopped after step {self.done} of {self.ready.total_steps}: "
                + ("the held-out pictures' loss has not gone down" if self.scores is None else "no score has gone up")
                + f" in the last {self.cfg.validation.stop_early} measurements (--stop-early)"
            )
        print(f"\nthe LoRA: {path}")
        for name, kind in self._best():
            print(f"{kind}: {self.folder.path / name}")
        print(f"the report: {page}", flush=True)
        self._publish(path)

    def _publish(self, path: Path) -> None:
        """Write what can be published, and upload it where asked; a failure is told and does no harm."""
        assert self.samples is not None
        assert self.uploads is not None
        save = self.cfg.save
        samples = list(zip(self.ready.prompts, self.samples.pictures(self.done), strict=False))
        card = model_card_of(self.cfg, self.ready, self.done, samples, shared_options(self.cfg))
        if not write_card(self.folder.hub, path, card):
            print(f"{self.folder.hub / 'README.md'} was changed by hand, so it is kept as it is")
        if save.upload is None:
            return
        for best in self.folder.saved_best().values():  # others were the best for a while, and are gone
            self.uploads.take_lora(best)
        self.uploads.finish()
        try:
            print(f"uploaded to {upload(self.folder.hub, target_of(save))}", flush=True)
        except UserError as error:
            print(f"lorasmith: {error}", file=sys.stderr, flush=True)

    def _best(self) -> list[tuple[str, str]]:
        """Return the best file of those that --keep-best kept, and what it is."""
        losses = [] if self.validation_losses is None else self.validation_losses.losses
        if self.scores is not None:
            losses = self.scores.losses
        kept = self.folder.saved_best() if self.cfg.validation.keep_best else {}
        best = [step for step in best_steps(losses, 1) if step in kept]
        kind = "the lowest loss of held-out pictures" if self.scores is None else "the highest score of samples"
        return [(kept[step].name, f"{kind}, {abs(dict(losses)[step]):.4f} after step {step}") for step in best]

    def _open_folder(self, stack: ExitStack) -> None:
        if self.state is None and (aside := move_aside(self.folder)) is not None:
            print(f"the older run was moved to {aside}")
        self.folder.path.mkdir(parents=True, exist_ok=True)
        stored = self.cfg.model_dump(mode="json", exclude_none=True, exclude_defaults=True, exclude=OF_ONE_START)
        with atomic_file(self.folder.run_file) as path:
            path.write_text(config.dump_toml(with_whole_paths(stored)), encoding="utf-8")
        self.losses = LossLog(self.folder.loss_log, done=self.done)
        stack.callback(self.losses.close)
        if self.ready.validation is not None:
            self.validation_losses = LossLog(self.folder.validation_log, done=self.done)
            stack.callback(self.validation_losses.close)
        self.samples = SamplesFolder(
            self.folder.samples, [asdict(drawing) for drawing in self.ready.drawings], done=self.done
        )
        if self.bench is not None:
            self.scores = SampleScores(self.folder.picture_log, self.bench, self.ready.drawings, done=self.done)
            stack.callback(self.scores.close)
        self.uploads = RunUploads(self.cfg.save, self.folder)
        stack.callback(self.uploads.close)
        log = self.cfg.log
        self.trackers = Trackers(
            log.trackers,
            board=self.folder.tensorboard if log.tensorboard else None,
            folder=self.folder.loss_log.parent,
            done=self.done,
            project=log.project,
            run_name=log.run_name or self.cfg.save.name or self.folder.path.resolve().name,
            run_id=run_id(self.cfg, self.ready, self.started_at),
            options=shared_options(self.cfg),
        )
        stack.callback(self.trackers.close)

    def _log(self, loss: float, rate: float, num_limited: int | None) -> None:
        assert self.losses is not None
        groups = self.optimizer.param_groups
        rates = {f"lr/{group['name']}": group["lr"] for group in groups}
        found = {f"d*lr/{group['name']}": d * group["lr"] for group in groups if (d := adaptation(group)) is not None}
        adapted = {"d*lr": max(found.values())} if found else {}
        limited = {} if num_limited is None else {"num_limited": num_limited}
        self.losses.append(self.done, loss, lr=max(rates.values()), **adapted, **limited)
        self._track({"loss": loss, **rates, **found, **limited})

    def _track(self, values: Mapping[str, float]) -> None:
        assert self.trackers is not None
        self.trackers.log(values, self.done)

    def _save_lora(self, path: Path) -> None:
        """Write the LoRA, read it back and compare."""
        precision = self.cfg.save.save_precision
        with self._as_saved():
            tensors = self.network.file_tensors()
        kohya.write(path, tensors, file_metadata(self.cfg, self.ready, self.done, self.started_at), precision=precision)
        kohya.check(path, tensors, precision=precision)

    def _save_state(self) -> None:
        ready = self.ready
        facts = StateFacts(
            self.done, ready.fingerprint, self.started_at, ready.plan.unit_sizes, ready.rates.optimizer.name
        )
        state = save_state(
            self.folder.states,
            facts,
            self.network.state_dict(),
            self.optimizer.state_dict(),
            self.stepper.scaler.state_dict(),
            None if self.average is None else self.average.state_dict(),
            keep=self.cfg.save.keep_states,
        )
        assert self.uploads is not None
        self.uploads.take_states(state)

    def _draw(self) -> None:
        """Draw the prompts as the model is now, and the sheet of all moments so far.

        Processes that share the model all draw the same, and process 0 keeps it.
        """
        drawings, is_main = self.ready.drawings, self.processes.is_main
        if not drawings or not (is_main or self.processes.shares_model):
            return
        if self.cfg.log.progress and is_main:
            sizes = dict.fromkeys(f"{width}x{height}" for width, height in (drawing.size for drawing in drawings))
            tqdm.write(f"drawing {len(drawings)} samples, {' and '.join(sizes)}", file=sys.stdout)
        with self.processes.in_step(), self._as_saved(), lent(self.model.vae, self.model.device):
            pictures = [
                picture
                for one in drawings
                for picture in generate(
                    self.model, [one.prompt], seeds=[one.seed], size=one.size, negative=one.negative,
                    steps=one.steps, guidance=one.guidance, sampler=one.sampler,
                )
            ]  # fmt: skip
        if is_main:
            assert self.samples is not None
            assert self.trackers is not None
            self.samples.add(self.done, pictures)
            self.trackers.show(pictures, self.done)
            self._judge_samples(pictures)

    def _report(self, path: Path, norms: Mapping[str, float]) -> ReportContents:
        assert self.losses is not None
        assert self.samples is not None
        before, after = (self.samples.pictures(step) for step in (0, self.done))
        settings = self.cfg.model_dump(mode="json", exclude_none=True, exclude={"resume", "dry_run"})
        return ReportContents(
            title=f"{self.cfg.save.title or self.cfg.save.name or self.folder.path.name}: a LoRA",
            summary=[
                f"{self.done} steps on {len(self.ready.records)} pictures for {Path(self.cfg.model.base).name}, "
                f"{self.ready.facts.title}."
                + (f" The largest update is in {max(norms, key=lambda name: norms[name])}." if norms else ""),
            ],
            settings=settings,
            losses=self.losses.losses,
            validation=[] if self.validation_losses is None else self.validation_losses.losses,
            rates=self._rates(),
            norms=norms,
            files=[*file_advice(path, self.folder, self.ready.facts), *self._best()],
            pictures=self._picture_losses(),
            scores=[] if self.scores is None else self.scores.lines,
            prompts=self.ready.prompts if after else [],
            before=before,
            after=after,
        )

    def _rates(self) -> dict[str, list[tuple[int, float]]]:
        """Return the learning rate over the steps that were taken, where it has a part in them."""
        if self.ready.rates.optimizer.owns_rate:
            return {}
        names = [group["name"] for group in self.optimizer.param_groups]
        return rate_curves(zip(names, self.stepper.base_rates, strict=True), self.ready.schedule, self.done)

    def _picture_losses(self) -> dict[str, list[tuple[int, float]]]:
        """Return the (step, loss) of each held-out picture, by its name."""
        losses: dict[str, list[tuple[int, float]]] = {}
        for line in [] if self.ready.validation is None else read_log(self.folder.validation_log):
            for name, loss in line.get("pictures", {}).items():
                losses.setdefault(name, []).append((line["step"], loss))
        return losses
