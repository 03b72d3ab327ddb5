"""What a run shows of itself while it trains: the loss on held-out samples, and a grid of pictures."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from config.job_config import JobConfig
from flux.batch import EncodedBatch, RawBatch
from flux.clip_score import ClipScorer, load_clip_scorer
from flux.config import TIME_STEPS
from flux.data.loader import Loader
from flux.data.shape_score import can_score, describe_scores, score_pictures
from flux.encode_ahead import EncodeAhead
from flux.pictures import make_images, save_grid
from flux.prompts import load_prompts
from flux.sampling import draw_pictures
from flux.spec import ModelSpec
from parallel.data_parallel import reshard
from parallel.mesh import Layout
from training.ema import ema_weights
from training.metrics import MetricsLogger
from training.validation import describe_loss, summarize_errors

log = logging.getLogger("train")
OF_AVERAGE = "_ema"  # ends the names of what was measured and drawn with the average of the weights


class EvaluationStopped(Exception):
    """The run is to leave; what was measured so far is dropped."""


class Evaluator:
    """Validates and draws with the model that is being trained. All ranks do the same.

    Args:
        ahead: has the encoders, which work for training too.
        loader: held-out batches.
        squared_errors: of the samples of a batch, summed over this rank's tokens; the very function that training
            minimizes.
        predict: the velocity of all tokens, on every rank.
        ema: average of the weights; empty: there is none.
        after_change: called each time other weights have been put into the model.
        must_stop: asked again and again, on all ranks: whether to leave.
        metrics: where figures go; None on ranks that write none.
    """

    def __init__(
        self,
        config: JobConfig,
        folder: Path,
        layout: Layout,
        spec: ModelSpec,
        ahead: EncodeAhead,
        model: nn.Module,
        loader: Loader,
        squared_errors: Callable[[RawBatch, EncodedBatch], Tensor],
        predict: Callable[..., Tensor],
        dtype: torch.dtype,
        ema: Mapping[str, Tensor],
        after_change: Callable[[], object],
        must_stop: Callable[[], bool],
        metrics: MetricsLogger | None,
    ):
        self.config, self.folder, self.layout, self.spec = config, folder, layout, spec
        self.ahead, self.model, self.loader, self.dtype = ahead, model, loader, dtype
        self.squared_errors, self.predict, self.metrics = squared_errors, predict, metrics
        self.ema, self.after_change, self.must_stop = ema, after_change, must_stop
        section = config.validation
        self.prompts: list[str] = []
        if section.eval_freq and section.prompts_path:
            self.prompts = load_prompts(section.prompts_path, "validation.prompts_path")[: section.save_img_count]
        elif section.eval_freq:
            self.prompts = loader.captions(section.save_img_count)
        self.clip_scorer: ClipScorer | None = None
        if section.eval_freq and section.clip_score_path:  # looked at on every rank: a wrong one ends all of them
            self.clip_scorer = load_clip_scorer(section.clip_score_path, layout.device if metrics else "meta")

    def is_due(self, step: int) -> bool:
        """Whether there is something to validate or to draw after `step` updates."""
        section = self.config.validation
        return any(self.config.training.is_due(freq, step) for freq in (section.freq, section.eval_freq))

    def evaluate(self, step: int, samples: int) -> bool:
        """Validates and draws where that is due after `step` updates of `samples` samples in all, with the weights and
        with their average.

        Returns:
            Whether validation.target_loss is reached.

        Raises:
            EvaluationStopped: `must_stop` said so.
        """
        section, training = self.config.validation, self.config.training
        reached, is_validated = False, training.is_due(section.freq, step)
        if is_validated:
            loss = self.validate(step)["validation_loss"]
            reached = section.target_loss is not None and loss <= section.target_loss
        if reached:
            log.info("validation.target_loss=%g is reached after %d samples", section.target_loss, samples)
            if self.metrics:
                self.metrics.log(step, {"samples_to_target_loss": samples})
        is_drawn = section.eval_freq > 0 and (reached or training.is_due(section.eval_freq, step))
        if is_drawn:
            self.draw_grid(step)
        if self.ema and (is_validated or is_drawn):
            with ema_weights(self.ema, dict(self.model.named_parameters()), self.weights_changed):
                if is_validated:
                    self.validate(step, OF_AVERAGE)
                if is_drawn:
                    self.draw_grid(step, OF_AVERAGE)
        return reached

    def _predict(self, **inputs: Tensor | None) -> Tensor:
        self._check_stop()
        return self.predict(**inputs)

    def _check_stop(self) -> None:
        if self.must_stop():
            reshard(self.model)  # or what was gathered would stand in for the weights that are saved now
            raise EvaluationStopped

    def weights_changed(self) -> None:
        """To be called when other weights have been put into the model."""
        reshard(self.model)  # what was gathered is of the weights before
        self.after_change()

    @torch.no_grad()
    def validate(self, step: int, of: str = "") -> dict[str, float]:
        """Mean squared error over the held-out samples, with fixed noise and times: `summarize_errors`.

        Args:
            of: "", or OF_AVERAGE for the names of the figures in the metrics.
        """
        end, layout = self.loader.end, self.layout
        assert end is not None
        if self.metrics and not of:
            self.metrics.start_validation(step)
        # Mean squared error and time of every sample, each at its place: all layouts and batch sizes add up alike.
        found = torch.zeros(2, end, dtype=torch.float64, device=layout.device)
        bad = torch.zeros((), dtype=torch.float64, device=layout.device)
        for raw in self.loader:
            self._check_stop()
            errors_B = self.squared_errors(*self.ahead.encode(raw))
            counts = slice(None) if raw.counts_B is None else raw.counts_B > 0
            places = raw.position_B[counts].to(layout.device)
            found[0, places] = errors_B[counts].double() / raw.draws.noise_BTC[0].numel()
            found[1, places] = raw.draws.t_B[counts].to(layout.device).double()
            bad += len(raw.bad)
        reshard(self.model)
        errors, times = layout.sum(found).cpu()
        if replaced := layout.sum(bad).item():
            log.warning("validation: others stand for %d bad samples", replaced / layout.degrees.cp)
        visits = TIME_STEPS if self.config.validation.all_timesteps else 1
        figures = summarize_errors(errors, times / layout.degrees.cp, visits)
        log.info("step %d: validation loss%s %s", step, " of the average" if of else "", describe_loss(figures))
        if self.metrics:
            self.metrics.log(step, {name.replace("_loss", f"_loss{of}", 1): value for name, value in figures.items()})
        return figures

    def draw_grid(self, step: int, of: str = "") -> None:
        """Draws the prompt grid, with the same noise every time, and says where it is and what share of it is right.

        Args:
            of: "", or OF_AVERAGE for the names of the picture and its scores.
        """
        validation, side, layout = self.config.validation, self.config.training.img_size, self.layout
        # All groups draw equally many, since ranks wait for each other: the last prompt fills up.
        share = -(-len(self.prompts) // layout.degrees.dp)
        mine = [min(layout.dp_rank * share + place, len(self.prompts) - 1) for place in range(share)]
        with self.ahead.in_order():
            pixels_BCHW = draw_pictures(
                self._predict,
                self.spec,
                self.ahead.encoders,
                [self.prompts[number] for number in mine],
                seeds=mine,
                height=side,
                width=side,
                steps=validation.denoising_steps,
                guidance=self.config.training.guidance,
                cfg_scale=validation.cfg_scale,
                batch_size=validation.local_batch_size,
                dtype=self.dtype,
            )
        reshard(self.model)
        pixels_BCHW = layout.gather_samples(pixels_BCHW.to(layout.device))[: len(self.prompts)]
        path = self.folder / validation.save_img_folder / f"step-{step:06d}{of}.png"
        if self.metrics is None:
            return
        images = make_images(pixels_BCHW.cpu())
        save_grid(images, path)
        self.metrics.log_image(step, f"samples{of}", path)
        told, scores = str(path), dict[str, float]()
        if can_score(self.prompts):
            scores = score_pictures(images, self.prompts)
            told += f" has right {describe_scores(scores)}"
        if self.clip_scorer:
            scores["clip_score"] = self.clip_scorer.score(images, self.prompts, validation.local_batch_size)
            told += f", CLIP score {scores['clip_score']:.2f}"
        if scores:
            self.metrics.log(step, {f"{name}{of}": score for name, score in scores.items()})
        log.info("step %d: %s", step, told)
