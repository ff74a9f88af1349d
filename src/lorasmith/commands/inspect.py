"""`lorasmith inspect`: what is in a LoRA or a checkpoint, and which programs will load it.

    lorasmith inspect lora.safetensors --picture norms.png --json lora.json

All facts are gathered as plain values first; the page is made of the same values as the JSON.
"""

import hashlib
import json
import math
import zlib
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasmith import model_families
from lorasmith.checkpoint import Checkpoint, atomic_file, open_checkpoint
from lorasmith.command_line import harmless, quoted
from lorasmith.config import InspectConfig
from lorasmith.errors import UserError
from lorasmith.formats import clients, kohya
from lorasmith.formats.dialects import DIALECTS, FAMILIES, AnyLora, holds_lora, kind_of, read_any
from lorasmith.lora_files import NEED_BASE, stored_shape
from lorasmith.models.keys import sd as keys
from lorasmith.network import recognise
from lorasmith.report import draw_norms, norms_by_block

_PICTURES = (".png", ".svg")
_NUM_TAGS = 20
_NUM_EXTRAS = 5  # that are on the page
_NUM_ENTRIES = 30  # of metadata that are on the page
_MAX_LETTERS = 90  # of a value on the page
_MAX_LEVELS = 20  # of JSON in metadata
_BLOCK, _PART = 1 << 20, 1 << 16  # bytes; AutoV1 is of so many at so many

# What is shown of the training: name in the header -> how it is called.
_SETTINGS = {
    "ss_output_name": "name", "ss_sd_model_name": "base model", "ss_base_model_version": "base version",
    "ss_network_module": "network", "ss_network_dim": "rank", "ss_network_alpha": "alpha",
    "ss_network_args": "network options", "ss_steps": "steps", "ss_max_train_steps": "steps wanted",
    "ss_epoch": "epochs", "ss_num_train_images": "pictures x repeats", "ss_num_reg_images": "regularization x repeats",
    "ss_resolution": "resolution", "ss_batch_size_per_device": "batch size", "ss_learning_rate": "learning rate",
    "ss_unet_lr": "U-Net's", "ss_text_encoder_lr": "text encoder's", "ss_lr_scheduler": "schedule",
    "ss_optimizer": "optimizer", "ss_clip_skip": "clip skip", "ss_noise_offset": "noise offset",
    "ss_min_snr_gamma": "min-SNR gamma", "ss_mixed_precision": "mixed precision", "ss_seed": "seed",
    "ss_training_comment": "comment", "modelspec.title": "title", "modelspec.author": "author",
    "modelspec.license": "license", "modelspec.description": "description", "modelspec.architecture": "architecture",
    "modelspec.trigger_phrase": "trigger", "modelspec.prediction_type": "prediction", "modelspec.date": "date",
}  # fmt: skip
_TIMES = {"ss_training_started_at": "started", "ss_training_finished_at": "finished"}


def run(cfg: InspectConfig) -> int:
    """Look into the file, tell what is in it, and return the exit code: 0, or 1 for NaN, or a hash that is wrong."""
    if cfg.file is None:
        raise UserError("missing: FILE, what to look into. For example: lorasmith inspect lora.safetensors")
    _check_outputs(cfg)
    if holds_lora(cfg.file):
        facts = lora_facts(read_any(cfg.file))
    else:
        with open_checkpoint(cfg.file) as checkpoint:
            facts = checkpoint_facts(checkpoint)
    if cfg.picture is not None:
        if not facts.get("norms"):
            raise UserError(f"--picture: {_why_not_drawn(facts)}; leave it out.")
        with atomic_file(cfg.picture) as temporary:
            drawn = temporary.with_name(temporary.name + cfg.picture.suffix.lower())
            draw_norms(drawn, facts["norms"])
            drawn.replace(temporary)
    text = "\n".join(map(_escaped, json.dumps(facts, indent=2, ensure_ascii=False).split("\n")))
    if cfg.json_file == "-":
        print(text)
    else:
        print("\n".join(map(harmless, _page(facts))))
    if cfg.json_file not in (None, "-"):
        with atomic_file(Path(cfg.json_file)) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    return 1 if facts["problems"] else 0


def _why_not_drawn(facts: Mapping[str, Any]) -> str:
    if unmeasured := facts.get("norms not known without the model"):
        return (
            f"the norms of {facts['file']} cannot be drawn ({_counts(unmeasured)}): the change depends on the base "
            "model's weights"
        )
    return f"{facts['file']} has no changes of layers that could be drawn"


def _check_outputs(cfg: InspectConfig) -> None:
    """Refuse what could not be written, or would replace a file, before anything is read."""
    if cfg.picture is not None and cfg.picture.suffix.lower() not in _PICTURES:
        raise UserError(f"--picture {cfg.picture}: expected is a name that ends in {' or '.join(_PICTURES)}.")
    json_file = None if cfg.json_file in (None, "-") else Path(cfg.json_file)
    for path in (cfg.picture, json_file):
        if path is not None and path.exists() and not cfg.overwrite:
            raise UserError(f"{path} exists; choose another name, or add --overwrite.")


# ---- a LoRA --------------------------------------------------------------------------------------------------------


def lora_facts(lora: AnyLora) -> dict[str, Any]:
    """Return all that is known of a LoRA, as plain values."""
    layers = lora.layers()
    ranks = [rank for own in layers.values() if (rank := _rank(own)) is not None]
    alphas = [_number(own["alpha"]) for own in layers.values() if "alpha" in own]
    broken = [name for name, own in layers.items() if not all(map(_is_finite, own.values()))]
    zero = [name for name, own in layers.items() if name not in broken and _is_zero(own)]
    hashes = _hashes(lora)
    norms, unmeasured = _norms(layers, {*broken})
    problems = [*([f"{len(broken):,} layers hold NaN or infinity"] if broken else []), *hashes.pop("problems")]
    return {
        "file": str(lora.path),
        "what": "LoRA",
        "family": lora.family,
        "form": DIALECTS[lora.dialect],
        "dialect": lora.dialect,
        "kinds": dict(Counter(str(kind_of(own)) for own in layers.values())),
        "rank": _range(ranks),
        "alpha": _range(alphas),
        "parts": _parts(lora, layers),
        "precision": dict(Counter(_dtype(t) for name, t in lora.tensors.items() if not name.endswith(".alpha"))),
        "norms": norms,
        "norms not known without the model": unmeasured,
        "problems": problems,
        "layers with NaN or infinity": broken,
        "layers that change nothing": zero,
        "mended names": list(lora.mended),
        "extras": lora.extras,
        "notes": list(lora.notes),
        **_told_of_training(lora.metadata),
        "hashes": hashes,
        "clients": {
            name: {"verdict": v.verdict, "because": list(v.because), "rests on": clients.CLIENTS[name]}
            for name, v in clients.verdicts(lora).items()
        },
        "advice": _advice(lora, broken),
        "metadata": _decoded(lora.metadata),
    }


def _rank(own: Mapping[str, Tensor]) -> int | None:
    """Return the rank of the products that a layer's change is made of; None where it is made of none."""
    first = next((own[tail] for tail in _FIRST_SIDE_IS_RANK if tail in own), None)
    if "a1.weight" in own:
        return min(own["a1.weight"].shape, default=None)  # GLoRA's pairs are in either order
    return None if first is None or not first.dim() else first.shape[0]


_FIRST_SIDE_IS_RANK = ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")


def _number(tensor: Tensor) -> float:
    return float(tensor.double().item())


def _range(values: list[float] | list[int]) -> dict[str, float] | None:
    finite = [value for value in values if math.isfinite(value)]
    return {"from": min(finite), "to": max(finite)} if finite else None


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())


def _is_zero(own: Mapping[str, Tensor]) -> bool:
    """Return whether a layer of plain LoRA changes nothing."""
    factors = [own[tail] for tail in ("lora_down.weight", "lora_up.weight", "alpha") if tail in own]
    return kind_of(own) == "LoRA" and any(not factor.float().any() for factor in factors)


def _parts(lora: AnyLora, layers: Mapping[str, Any]) -> dict[str, dict[str, int | None]]:
    """Return how many layers of each part are changed, beside how many a LoRA of the family goes on."""
    counts = Counter(_part_of_layer(name) for name in layers)
    full = {"U-Net": len(keys.unet_targets()), "text encoder": len(keys.text_targets("sd1"))}
    of = {"sd1": full, "sd2": {**full, "text encoder": len(keys.text_targets("sd2"))}}.get(lora.family, {})
    return {part: {"layers": counts[part], "of": of.get(part)} for part in [*full, *(counts.keys() - full.keys())]}


def _part_of_layer(name: str) -> str:
    if name in _UNET_TARGETS:
        return "U-Net"
    if name in _TEXT_TARGETS:
        return "text encoder"
    return "convolutions, norms and others" if name in _OTHER_LAYERS else "layers of other names"


_UNET_TARGETS, _TEXT_TARGETS = keys.unet_targets().keys(), keys.text_targets("sd2").keys()
_OTHER_LAYERS = keys.adapter_modules().keys()


def _norms(layers: Mapping[str, Mapping[str, Tensor]], broken: set[str]) -> tuple[dict[str, float], dict[str, int]]:
    """Return the norm of each block's change, and of how many layers it is not known without the model, by kind."""
    norms: dict[str, float] = {}
    unknown: Counter[str] = Counter()
    for name, own in layers.items():
        if name in broken:
            continue
        norm = _norm(own)
        if norm is None:
            unknown[str(kind_of(own))] += 1
        elif math.isfinite(norm):
            norms[name] = norm
    return norms_by_block(norms), dict(unknown)


def _norm(own: Mapping[str, Tensor]) -> float | None:
    """Return the norm of a layer's change; None where that depends on the weight, or the tensors do not tell.

    A change of the bias is not counted.
    """
    kind = kind_of(own)
    if kind == "LoRA":
        return kohya.norms({f"x.{tail}": tensor for tail, tensor in own.items()})["x"]
    if own.keys() <= {"diff_b", "b_norm"}:
        return 0.0
    if kind in NEED_BASE or "dora_scale" in own:
        return None
    try:
        shape = stored_shape(own)
        with torch.no_grad():
            return recognise(own).from_tensors(shape, own).delta(torch.zeros(shape)).norm().item()
    except (ValueError, RuntimeError):  # of no layer's size, or tensors that do not fit each other
        return None


def _hashes(lora: AnyLora) -> dict[str, Any]:
    """Return the hashes as sites and UIs show them, and whether those in the header are right."""
    if len(lora.files) != 1:
        return {"problems": []}
    path = lora.files[0]
    found: dict[str, Any] = file_hashes(path)
    if "AutoV3" not in found:
        return {**found, "problems": []}
    with open_checkpoint(path) as checkpoint:
        own = {name: checkpoint.tensor(name) for name in checkpoint.names()}
        legacy = kohya.hashes(own, checkpoint.metadata)["sshs_legacy_hash"]
        found |= {"sshs_legacy_hash": legacy}
    problems = [
        f"the header's {name} is {_cut(stored)}, and the tensors' own {found[name]}"
        for name in ("sshs_model_hash", "sshs_legacy_hash")
        if (stored := lora.metadata.get(name)) not in (None, found[name])
    ]
    return {**found, "problems": problems}


def file_hashes(path: Path) -> dict[str, str]:
    """Return the hashes by which sites and UIs know a file; those of the tensors only for a `.safetensors`."""
    whole, part, tensors, checksum = hashlib.sha256(), hashlib.sha256(), hashlib.sha256(), 0
    with path.open("rb") as file:
        start = file.read(9)
        header, begin = 8 + int.from_bytes(start[:8], "little"), 0
        file.seek(0)
        while block := file.read(_BLOCK):
            whole.update(block)
            checksum = zlib.crc32(block, checksum)
            tensors.update(block[max(header - begin, 0) :])
            part.update(block[:_PART] if begin == _BLOCK else b"")
            begin += len(block)
    found = {"sha256": whole.hexdigest(), "AutoV1": part.hexdigest()[:8], "AutoV2": whole.hexdigest()[:10]}
    if start[8:9] == b"{":
        found |= {"AutoV3": tensors.hexdigest()[:12], "sshs_model_hash": tensors.hexdigest()}
    return {**found, "CRC32": f"{checksum:08x}"}


def _decoded(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the metadata with what is JSON in it taken apart."""
    found: dict[str, Any] = dict(metadata)
    for name, text in metadata.items():
        if text.startswith(("{", "[")):
            try:
                content = json.loads(text, parse_constant=_refuse_constant)
            except (ValueError, RecursionError):
                continue
            if not _is_deep(content, _MAX_LEVELS):
                found[name] = content
    return found


def _refuse_constant(name: str) -> None:
    """Refuse NaN and infinity, which other readers of JSON do not know."""
    raise ValueError(name)


def _is_deep(content: Any, levels: int) -> bool:
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return not levels or any(_is_deep(value, levels - 1) for value in inner)


def _escaped(line: str) -> str:
    """Return a line of JSON of which nothing changes how a terminal shows it; it means the same."""
    if line.isprintable():
        return line
    return "".join(letter if letter.isprintable() else json.dumps(letter)[1:-1] for letter in line)


def _told_of_training(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what the header says, readable."""
    settings = {title: metadata[name] for name, title in _SETTINGS.items() if metadata.get(name) not in (None, "None")}
    for name, title in _TIMES.items():
        if (when := _time(metadata.get(name, ""))) is not None:
            settings[title] = when
    tags: Counter[str] = Counter()
    for folder in _objects(metadata.get("ss_tag_frequency", "{}")):
        tags.update({tag.strip(): count for tag, count in folder.items() if type(count) is int})
    return {"training": settings, "tags": dict(tags.most_common(_NUM_TAGS)), "number of tags": len(tags)}


def _time(text: str) -> str | None:
    try:
        return datetime.fromtimestamp(float(text), timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return None


def _objects(text: str) -> list[dict[str, Any]]:
    """Return the objects in a JSON object; none for what is no such JSON."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return [value for value in content.values() if isinstance(value, dict)] if isinstance(content, dict) else []


def _advice(lora: AnyLora, broken: list[str]) -> list[str]:
    """Return what to do about a file that programs do not load as it is."""
    if broken:
        return ["NaN or infinity breaks every picture: go back to an earlier file of the training."]
    mendable = [trait for trait in clients.traits(lora) if trait in clients.MENDABLE]
    if not mendable or lora.family in ("flux", "sd3", "another"):
        return []
    output = lora.path.with_name(f"{lora.path.stem}-kohya.safetensors")
    return [f"{', '.join(mendable)}: lorasmith convert {quoted(lora.path)} --output {quoted(output)}"]


# ---- a checkpoint --------------------------------------------------------------------------------------------------


def checkpoint_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint's header says, as plain values."""
    names = checkpoint.names()
    by_part: dict[str, Counter[str]] = {}
    for name in names:
        by_part.setdefault(_part_of(name), Counter())[str(checkpoint.dtype(name)).removeprefix("torch.")] += 1
    facts: dict[str, Any] = {
        "file": str(checkpoint.path),
        "what": "checkpoint",
        "format": checkpoint.format,
        "tensors": len(names),
        "precision": {part: dict(counts) for part, counts in by_part.items()},
        "moving average (EMA)": any(name.startswith(keys.EMA) for name in names),
        "problems": [],
    }
    try:
        model = model_families.describe(checkpoint)
        missing, unknown = model_families.gaps(checkpoint)
    except UserError as error:
        facts |= {"family": "unknown", "notes": [str(error)]}
    else:
        facts |= {
            "family": model.family,
            "title": model.title,
            "prediction": model.prediction,
            "resolution": list(model.resolution),
            "numbers": model.num_values,
            "notes": model.notes,
            "missing": missing,
            "unknown": unknown,
            "problems": [f"{len(missing):,} weights are missing, such as {missing[0]}"] if missing else [],
        }
    if checkpoint.path.is_file():
        facts["hashes"] = file_hashes(checkpoint.path)
    return {**facts, "metadata": _decoded(checkpoint.metadata)}


# Beginning of a name -> part.
_STARTS = {
    keys.UNET: "U-Net", "unet/": "U-Net", keys.VAE: "VAE", "vae/": "VAE", "cond_stage_model.": "text encoder",
    "text_encoder": "text encoder", "conditioner.": "text encoder", keys.EMA: "moving average (EMA)",
}  # fmt: skip


def _part_of(name: str) -> str:
    return next((part for start, part in _STARTS.items() if name.startswith(start)), "others")


# ---- the page ------------------------------------------------------------------------------------------------------


def _page(facts: Mapping[str, Any]) -> list[str]:
    return _lora_page(facts) if facts["what"] == "LoRA" else _checkpoint_page(facts)


def _line(title: str, text: object) -> str:
    return f"{title:<16}{text}"


def _lora_page(facts: Mapping[str, Any]) -> list[str]:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in facts["kinds"].items())
    parts = [
        f"{part} {one['layers']:,}{'' if one['of'] is None else ' of ' + str(one['of'])}"
        for part, one in facts["parts"].items()
        if one["layers"] or one["of"]
    ]
    lines = [
        _line("file", facts["file"]),
        _line("what", f"LoRA for {FAMILIES[facts['family']]}; names: {facts['form']}"),
        _line("layers", f"{kinds}; {', '.join(parts)}"),
        _line("rank", _span(facts["rank"])),
        *([_line("alpha", _alpha_told(facts))] if facts["rank"] or facts["alpha"] else []),
        _line("precision", _counts(facts["precision"])),
        *(_line("problem", problem) for problem in facts["problems"]),
    ]
    for title in ("layers with NaN or infinity", "layers that change nothing", "mended names"):
        if names := facts[title]:
            lines.append(_line("", f"{title}: {len(names):,}, such as {names[0]}"))
    extras = list(facts["extras"].items())
    lines += [_line("extra", f"{name}: {what}") for name, what in extras[:_NUM_EXTRAS]]
    if len(extras) > _NUM_EXTRAS:
        lines.append(_line("", f"and {len(extras) - _NUM_EXTRAS:,} more that belong to no layer, all in --json"))
    lines += [_line("note", note) for note in facts["notes"]]
    if facts["norms"]:
        top = max(facts["norms"].values()) or 1.0
        lines += ["", "norm of each block's change"]
        lines += [
            f"  {block:<10}{norm:>10.4g}  {'#' * round(40 * norm / top)}" for block, norm in facts["norms"].items()
        ]
    if unmeasured := facts["norms not known without the model"]:
        lines += ["", _line("not measured", f"{_counts(unmeasured)}: the change depends on the base model's weights")]
    lines += ["", *(["training"] if facts["training"] else ["no metadata of a training"])]
    lines += [f"  {title:<26}{_cut(value)}" for title, value in facts["training"].items()]
    if facts["tags"]:
        told = ", ".join(f"{_cut(tag, 40)} {count}" for tag, count in facts["tags"].items())
        lines += [f"  {'tags':<26}{facts['number of tags']:,}: {told}"]
    lines += _other_metadata(facts["metadata"])
    lines += ["", "hashes", *(f"  {name:<24}{value}" for name, value in facts["hashes"].items())]
    lines += ["", "programs (as of the versions named; newer ones may differ)"]
    for name, one in facts["clients"].items():
        why = f" ({', '.join(one['because'])})" if one["because"] else ""
        lines.append(f"  {name:<22}{clients.VERDICTS[one['verdict']]}{why} [{one['rests on']}]")
    return [*lines, *(_line("what to do", advice) for advice in facts["advice"])]


def _checkpoint_page(facts: Mapping[str, Any]) -> list[str]:
    lines = [
        _line("file", facts["file"]),
        _line("what", f"{facts['format']} file or folder, {facts['tensors']:,} tensors"),
    ]
    if "title" in facts:
        width, height = facts["resolution"]
        lines += [
            _line("family", f"{facts['title']}, trained at {width}x{height}"),
            _line("predicts", facts["prediction"]),
            _line("missing", f"{len(facts['missing']):,} weights {facts['missing'][:3] or ''}"),
            _line("unknown", f"{len(facts['unknown']):,} tensors {facts['unknown'][:3] or ''}"),
        ]
    lines += [_line("note", note) for note in facts["notes"]]
    lines += [_line("precision", f"{part}: {_counts(counts)}") for part, counts in facts["precision"].items()]
    lines += [_line("EMA", "yes" if facts["moving average (EMA)"] else "no")]
    lines += [_line(name, value) for name, value in facts.get("hashes", {}).items()]
    return [*lines, *_other_metadata(facts["metadata"])]


def _span(span: Mapping[str, float] | None) -> str:
    if span is None:
        return "none: other kinds of changes"
    return f"{span['from']:g}" if span["from"] == span["to"] else f"{span['from']:g} to {span['to']:g}"


def _alpha_told(facts: Mapping[str, Any]) -> str:
    return _span(facts["alpha"]) if facts["alpha"] else "not in the file: as the rank"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _other_metadata(metadata: Mapping[str, Any]) -> list[str]:
    """Return lines on the metadata that are not told elsewhere, the values cut."""
    others = {name: value for name, value in metadata.items() if name not in _TOLD and value not in ("", "None")}
    lines = [f"  {_cut(name, 40):<40}  {_cut(_as_text(value))}" for name, value in others.items()]
    more = f"  and {len(lines) - _NUM_ENTRIES:,} more, all in --json" if len(lines) > _NUM_ENTRIES else ""
    return ["", "other metadata", *lines[:_NUM_ENTRIES], *([more] if more else [])] if lines else []


_TOLD = {*_SETTINGS, *_TIMES, "ss_tag_frequency", "format", "sshs_model_hash", "sshs_legacy_hash"}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cut(text: str, num_letters: int = _MAX_LETTERS) -> str:
    """Return the beginning of a text, in one line, with how long it is if that is not all."""
    line = harmless(" ".join(text[: 4 * num_letters].split()))
    if len(line) <= num_letters and len(text) <= 4 * num_letters:
        return line
    return f"{line[: num_letters - 20]}... ({len(text):,} letters)"
