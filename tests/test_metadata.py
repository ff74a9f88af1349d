"""Metadata against a file that sd-scripts wrote, and the size of the header."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith import metadata

_LINES = (Path(__file__).parent / "golden" / "lora_metadata_sd1.txt").read_text(encoding="utf-8").splitlines()
GOLDEN = dict(line.split(" = ", 1) for line in _LINES if not line.startswith("#"))

VALUES: dict[str, Any] = {  # the run that the golden file is of, as plain values
    "base_model_version": "sd_v1",
    "batch_size_per_device": 1,
    "cache_latents": True,
    "dataset_dirs": {"1_sks thing": {"n_repeats": 1, "img_count": 8}},
    "enable_bucket": False,
    "epoch": 1,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "learning_rate": 1e-4,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "max_grad_norm": 1.0,
    "max_train_steps": 5,
    "mixed_precision": "no",
    "network_alpha": 1,
    "network_dim": 4,
    "new_sd_model_hash": "12f04c1b0728fa9d423dfb306381e49ee0e3bb697c46916f6a2d575bd967627b",
    "num_batches_per_epoch": 8,
    "num_epochs": 1,
    "num_reg_images": 0,
    "num_train_images": 8,
    "optimizer": "torch.optim.adamw.AdamW",
    "output_name": "kohya_f512_fp32",
    "resolution": (512, 512),
    "sd_model_hash": "a0c97375",
    "sd_model_name": "full.safetensors",
    "seed": 42,
    "session_id": 10923882,
    "steps": 5,
    "tag_frequency": {"1_sks thing": {f"sks thing number {i}": 1 for i in range(8)}},
    "total_batch_size": 1,
    "training_finished_at": 1795224876.790517,
    "training_started_at": 1795224631.2461238,
    "v2": False,
}


def test_training_metadata_is_what_sd_scripts_wrote_key_for_key() -> None:
    assert metadata.training(VALUES) == {key: value for key, value in GOLDEN.items() if key.startswith("ss_")}


def test_model_spec_is_what_sd_scripts_wrote() -> None:
    ours = metadata.model_spec(
        architecture="stable-diffusion-v1",
        title="kohya_f512_fp32",
        resolution=(512, 512),
        time=1795224876.790517,
        prediction="epsilon",
        implementation_version="sd-scripts/unknown",
    )
    theirs = {key: value for key, value in GOLDEN.items() if key.startswith("modelspec.")}
    assert ours == {**theirs, "modelspec.date": "2026-11-21T01:34:36"}


def test_model_spec_says_v_and_leaves_out_what_is_not_given() -> None:
    spec = metadata.model_spec(
        architecture="stable-diffusion-v2-768-v", title="t", resolution=(768, 512), time=0, prediction="v_prediction",
        implementation_version="x", author="me", tags="a, b",
    )  # fmt: skip
    assert spec["modelspec.prediction_type"] == "v" and spec["modelspec.resolution"] == "768x512"
    assert spec["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert spec["modelspec.author"] == "me" and "modelspec.license" not in spec
    assert spec["modelspec.date"] == "1970-01-01T00:00:00"


def test_optional_values_are_there_only_when_given() -> None:
    with_vae = metadata.training({**VALUES, "vae_name": "vae.pt", "network_args": {"conv_dim": "4"}})
    assert with_vae["ss_vae_name"] == "vae.pt" and json.loads(with_vae["ss_network_args"]) == {"conv_dim": "4"}
    assert not {"ss_vae_name", "ss_network_args"} & metadata.training(VALUES).keys()


def test_a_misspelt_or_missing_value_is_an_error() -> None:
    with pytest.raises(KeyError, match="no such ss_ metadata: sead"):
        metadata.training({**VALUES, "sead": 1})
    with pytest.raises(KeyError, match="without a value: seed"):
        metadata.training({key: value for key, value in VALUES.items() if key != "seed"})


@pytest.mark.parametrize("num_values", [10, 400_000])
def test_hashes_are_of_the_tensors_and_of_64_kib_at_1_mib(num_values: int) -> None:
    serialized = safetensors.torch.save({"a": torch.arange(num_values, dtype=torch.float32)}, {"ss_x": "1"})
    tensors = torch.arange(num_values, dtype=torch.float32).numpy().tobytes()
    assert metadata.model_hash(serialized) == hashlib.sha256(tensors).hexdigest()
    expected = hashlib.sha256(serialized[2**20 : 2**20 + 2**16]).hexdigest()[:8]
    assert metadata.legacy_hash(serialized) == expected
    assert (expected == "e3b0c442") == (len(serialized) < 2**20)


def test_what_fits_is_not_changed() -> None:
    assert metadata.fit(GOLDEN) == GOLDEN


counts = st.dictionaries(st.text(max_size=20), st.integers(1, 9), max_size=40)


@given(tags=st.dictionaries(st.text(max_size=8), counts, max_size=3), num_buckets=st.integers(0, 40))
@settings(max_examples=30, deadline=None)
def test_what_is_too_long_is_shortened_and_says_so(tags: dict[str, dict[str, int]], num_buckets: int) -> None:
    buckets = {str(i): {"resolution": [64 * i, 512], "count": i + 1} for i in range(num_buckets)}
    text = json.dumps
    full = {"ss_tag_frequency": text(tags), "ss_bucket_info": text({"buckets": buckets}), "ss_seed": "1"}
    limit = 600
    short = metadata.fit(full, limit)
    is_too_long = len(json.dumps(full, ensure_ascii=False).encode()) > limit
    assert (metadata.TRUNCATED_KEY in short) == is_too_long
    assert len(json.dumps(short, ensure_ascii=False).encode()) <= limit
    assert short["ss_seed"] == "1"
    for folder, kept in json.loads(short["ss_tag_frequency"]).items():
        assert kept.items() <= tags[folder].items()
        left_out = tags[folder].keys() - kept.keys()
        assert not left_out or min(kept.values(), default=9) >= max(tags[folder][tag] for tag in left_out)
    assert json.loads(short["ss_bucket_info"])["buckets"].items() <= buckets.items()


def test_data_sets_are_shortened_like_the_whole() -> None:
    tags = {"photos": {f"tag {i}": 1000 - i for i in range(1000)}}
    buckets = {"buckets": {str(i): {"resolution": [64 * i, 512], "count": i + 1} for i in range(40)}}
    datasets = [
        {"tag_frequency": tags, "bucket_info": buckets, "subsets": [1]},
        {"tag_frequency": {}, "bucket_info": None, "subsets": [2]},
    ]
    short = metadata.fit({"ss_datasets": json.dumps(datasets), "ss_seed": "1"}, 5000)
    assert short[metadata.TRUNCATED_KEY] == "ss_datasets" and metadata._size(short) <= 5000
    first, second = json.loads(short["ss_datasets"])
    kept = first["tag_frequency"]["photos"]
    assert list(kept) == [f"tag {i}" for i in range(len(kept))] and 100 < len(kept) < 300
    assert "39" in first["bucket_info"]["buckets"] and "0" not in first["bucket_info"]["buckets"]
    assert first["subsets"] == [1] and second == datasets[1]


def test_with_data_sets_what_each_has_is_not_said_of_all() -> None:
    written = metadata.training({**VALUES, "datasets": [{"resolution": (512, 512)}]})
    assert json.loads(written["ss_datasets"]) == [{"resolution": [512, 512]}]
    assert written.keys() < {*metadata.training(VALUES), "ss_datasets"} and "ss_resolution" not in written


def test_the_larger_one_is_shortened_first() -> None:
    tags = {"1_x": {f"tag {i}": 1000 - i for i in range(1000)}}
    full = {"ss_tag_frequency": json.dumps(tags), "ss_bucket_info": '{"buckets": {"0": {"count": 3}}}'}
    short = metadata.fit(full, 5000)
    assert short[metadata.TRUNCATED_KEY] == "ss_tag_frequency"
    assert short["ss_bucket_info"] == full["ss_bucket_info"]
    kept = json.loads(short["ss_tag_frequency"])["1_x"]
    assert list(kept) == [f"tag {i}" for i in range(len(kept))] and 100 < len(kept) < 300
