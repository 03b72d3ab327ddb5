"""What a run shows of itself while it trains: the loss on held-out samples, and a grid of pictures."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from config.job_config import JobConfig
from flux.batch import RawBatch
from flux.data.loader import Loader
from flux.data.shape_score import can_score, describe_scores, score_pictures
from flux.encoders import Encoders
from flux.pictures import make_images, save_grid
from flux.prompts import load_prompts
from flux.sampling import draw_pictures
from flux.spec import ModelSpec
from parallel.data_parallel import reshard
from parallel.mesh import Layout
from training.metrics import MetricsLogger

log = logging.getLogger("train")


class Evaluator:
    """Validates and draws with the model that is being trained. All ranks do the same.

    Args:
        loader: held-out batches.
        squared_error: of a batch, summed over this rank's tokens; the very function that training minimizes.
        predict: the velocity of all tokens, on every rank.
        metrics: where figures go; None on ranks that write none.
    """

    def __init__(
        self,
        config: JobConfig,
        folder: Path,
        layout: Layout,
        spec: ModelSpec,
        encoders: Encoders,
        model: nn.Module,
        loader: Loader,
        squared_error: Callable[[RawBatch], Tensor],
        predict: Callable[..., Tensor],
        dtype: torch.dtype,
        metrics: MetricsLogger | None,
    ):
        self.config, self.folder, self.layout, self.spec = config, folder, layout, spec
        self.encoders, self.model, self.loader, self.dtype = encoders, model, loader, dtype
        self.squared_error, self.predict, self.metrics = squared_error, predict, metrics
        section = config.validation
        self.prompts: list[str] = []
        if section.eval_freq and section.prompts_path:
            self.prompts = load_prompts(section.prompts_path, "validation.prompts_path")[: section.save_img_count]
        elif section.eval_freq:
            self.prompts = loader.captions(section.save_img_count)

    @torch.no_grad()
    def validate(self, step: int) -> float:
        """Mean squared error over the held-out samples, with fixed noise and times."""
        end = self.loader.end
        assert end is not None
        if self.metrics:
            self.metrics.start_validation(step)
        total = torch.zeros(2, dtype=torch.float64, device=self.layout.device)  # squared error, bad samples
        for raw in self.loader:
            total[0] += self.squared_error(raw)
            total[1] += len(raw.bad)
        reshard(self.model)
        error, bad = self.layout.sum(total).tolist()
        if bad:
            log.warning("validation: others stand for %d bad samples", bad / self.layout.degrees.cp)
        loss = error / (end * raw.draws.noise_BTC[0].numel())
        if self.metrics:
            self.metrics.log(step, {"validation_loss": loss})
        return loss

    def draw_grid(self, step: int) -> str:
        """Draws the prompt grid, with the same noise every time, and says where it is and what share of it is right."""
        validation, side, layout = self.config.validation, self.config.training.img_size, self.layout
        # All groups draw equally many, since ranks wait for each other: the last prompt fills up.
        share = -(-len(self.prompts) // layout.degrees.dp)
        mine = [min(layout.dp_rank * share + place, len(self.prompts) - 1) for place in range(share)]
        pixels_BCHW = draw_pictures(
            self.predict,
            self.spec,
            self.encoders,
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
        path = self.folder / validation.save_img_folder / f"step-{step:06d}.png"
        if self.metrics is None:
            return str(path)
        images = make_images(pixels_BCHW.cpu())
        save_grid(images, path)
        self.metrics.log_image(step, "samples", path)
        if not can_score(self.prompts):
            return str(path)
        scores = score_pictures(images, self.prompts)
        self.metrics.log(step, scores)
        return f"{path} has right {describe_scores(scores)}"
