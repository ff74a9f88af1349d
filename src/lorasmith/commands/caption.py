"""`lorasmith caption`: write a caption beside each picture, by a model that describes what it sees.

    lorasmith caption photos
    lorasmith caption photos --captioner vision-language --model my-vlm --prompt "Describe this picture."

What is there already is left alone. The same command, started again, goes on.
"""

from pathlib import Path

from lorasmith.config import CaptionConfig
from lorasmith.data import labelling, phrases
from lorasmith.data.images import set_pixel_limit
from lorasmith.errors import UserError
from lorasmith.taggers.base import CAPTIONS, Captioner, CaptionerOptions, choose_home, loader


def run(cfg: CaptionConfig) -> int:
    """Caption the folder; return the exit code: 0, 1 if pictures were left out, 130 / 143 when stopped."""
    if cfg.folder is None:
        raise UserError("missing: DIR, the folder of pictures. For example: lorasmith caption photos")
    load = loader(cfg.captioner, CAPTIONS)
    device, dtype = choose_home(cfg.device, cfg.precision)
    habits = [] if cfg.remove_phrases is None else phrases.read_phrases(cfg.remove_phrases)
    set_pixel_limit(cfg.max_megapixels)
    pictures, notes = labelling.find_pictures(cfg.folder, recursive=cfg.recursive)
    files = labelling.text_files(pictures, cfg.caption_extension)
    shard = labelling.choose_shard(cfg.shard)
    own = shard.of(list(files.of))
    existing = files.existing.intersection(own) if cfg.existing == "skip" else set()
    wanted = [picture for picture in own if picture not in existing]
    outcome = labelling.Outcome()
    if wanted:
        options = CaptionerOptions(
            cfg.model, device, dtype, cfg.max_length, cfg.min_length, cfg.beams, cfg.top_p, cfg.seed, cfg.prompt
        )
        with labelling.enough_memory(f"the model on {device}: --precision bf16, a smaller --model, or --device cpu"):
            captioner: Captioner = load(options)

        def keep(picture: Path, caption: str) -> None:
            write(picture, files.of[picture], phrases.cut(caption, habits), is_appended=cfg.existing == "append")

        outcome = labelling.label(wanted, captioner, keep, batch_size=cfg.batch_size, shard=shard)
    done = f"captions written beside the pictures in {cfg.folder}"
    notes += labelling.sharing_note(files.sharing)
    print(labelling.summary(outcome, shard, done, len(existing), notes))
    return outcome.exit_code


def write(picture: Path, file: Path, caption: str, *, is_appended: bool) -> None:
    """Write a caption into its file, or add it to the first line of what is there.

    Raises:
        UserError: the caption is empty, or the older file is not UTF-8.
    """
    if not caption:
        raise UserError(f"{picture}: the model said nothing; try another --prompt, --min-length or --model")
    if is_appended and file.exists():
        older = labelling.read_text(file)
        if caption in older.partition("\n")[0]:
            return
        caption = phrases.add_to_first_line(older, [caption], ", ")
    labelling.write_text(file, caption if "\n" in caption else f"{caption}\n")
