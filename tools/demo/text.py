"""The text encoder, taught alone to name thing, color and background, as CLIP's is taught before any U-Net.

Taught together with the U-Net, it told colors apart too weakly: half of the pictures had the wrong ones.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import recipe
import torch
from draw import COLORS, THINGS
from journal import Journal
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel

from lorasmith.checkpoint import atomic_file
from lorasmith.models import tokenizer

BATCH_SIZE = 48
_LEARNING_RATE = 1e-3
_REPORT_EVERY = 20
_UNSAID = -1
_COLORS = list(COLORS)
_THINGS = list(THINGS)
_ANSWERS = (len(_THINGS), len(_COLORS), len(_COLORS))  # thing, its color, background
_NUM_SHORT = 32  # positions: all captions end before, and the padding behind looks alike


@dataclass(frozen=True)
class Lesson:
    """A caption and the numbers of the thing and the two colors that it names."""

    caption: str
    answers: tuple[int, int, int]


def train(steps: int, target: Path, journal: Journal) -> None:
    """Teach for so many steps and write the encoder's weights."""
    torch.manual_seed(11)
    encoder = start()
    head = nn.Linear(recipe.TEXT_WIDTH, sum(_ANSWERS))
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, betas=(0.9, 0.98))
    strangers = unknown_words()
    for step in range(steps):
        rng = random.Random(f"text {step}")
        lessons = [draw_lesson(rng, strangers) for _ in range(BATCH_SIZE)]
        num_positions = tokenizer.NUM_POSITIONS if step % 8 == 0 else _NUM_SHORT
        scores, answers = _ask(encoder, head, lessons, num_positions, rng)
        loss, right = _mark(scores, answers)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % _REPORT_EVERY == 0 or step == steps - 1:
            journal.write(step=step, loss=round(loss.item(), 4), acc=right)
    with atomic_file(target) as temporary:
        torch.save(encoder.state_dict(), temporary)


def start() -> CLIPTextModel:
    """Return the untrained encoder: louder words and quieter layers, so that words reach the end of twelve layers."""
    encoder = recipe.build_text_encoder()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "token_embedding" in name:
                parameter.mul_(5.0)  # to plus or minus 0.1
            if "position_embedding" in name:
                parameter.mul_(2.0)
            if name.endswith(("out_proj.weight", "fc2.weight")):
                parameter.mul_(0.3)
    return encoder


def unknown_words() -> list[str]:
    """Return the vocabulary's plain words of three letters or more."""
    ending = "</w>"
    tokens = [token.removesuffix(ending) for token in tokenizer.build().get_vocab() if token.endswith(ending)]
    return sorted(token for token in tokens if token.isalpha() and token.isascii() and len(token) >= 3)


def draw_lesson(rng: random.Random, strangers: Sequence[str]) -> Lesson:
    """Return a caption of a training combination; in one of ten, the thing has another word's name."""
    number = rng.randrange(len(_THINGS))
    color, ground = rng.choice(recipe.TRAINING[_THINGS[number]])
    is_stranger = rng.random() < 0.1
    name = rng.choice(strangers) if is_stranger else _THINGS[number]
    caption = recipe.caption(name, color, ground, rng)
    says_color = caption.split(f" {name}")[0].split(" ")[-1] == color
    answers = (
        _UNSAID if is_stranger or not caption else number,
        _COLORS.index(color) if says_color else _UNSAID,
        _COLORS.index(ground) if f"{ground} background" in caption else _UNSAID,
    )
    return Lesson(caption, answers)


def learning_rate(step: int, steps: int) -> float:
    """Return the rate: warm-up over 50 steps, linear decay over the last four tenths."""
    decay = 1 if step < steps * 0.6 else max(0.02, (steps - step) / (steps * 0.4))
    return _LEARNING_RATE * min(1, (step + 1) / 50) * decay


def _ask(
    encoder: CLIPTextModel, head: nn.Module, lessons: list[Lesson], num_positions: int, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Return scores (B, 4, answers) and right answers (B, 4, 3), at the caption's end and three places behind it."""
    ids = recipe.tokenize([lesson.caption for lesson in lessons])
    hidden = encoder(ids[:, :num_positions]).last_hidden_state  # (B, positions, width)
    end = (ids == tokenizer.END).float().argmax(1)
    later = [torch.tensor([rng.randrange(int(first), num_positions) for first in end]) for _ in range(3)]
    places = torch.stack([end, *later], 1)  # (B, 4)
    scores = head(hidden[torch.arange(len(lessons))[:, None], places])
    answers = torch.tensor([lesson.answers for lesson in lessons])[:, None].expand(-1, places.shape[1], -1)
    return scores, answers


def _mark(scores: Tensor, answers: Tensor) -> tuple[Tensor, list[float]]:
    """Return the loss and the share of right answers for thing, color and background, where the caption says them."""
    loss, right = torch.zeros(()), []
    for kind, part in enumerate(scores.split(_ANSWERS, dim=-1)):
        answer = answers[..., kind].reshape(-1)
        given = part.reshape(len(answer), -1)[answer != _UNSAID]
        wanted = answer[answer != _UNSAID]
        loss = loss + functional.cross_entropy(given, wanted)
        right.append(round((given.argmax(1) == wanted).float().mean().item(), 3))
    return loss, right
