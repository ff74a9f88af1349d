"""`lorasmith train`: pictures in, a LoRA out.

    lorasmith train --base model.safetensors --images photos --output my-lora

Reads top to bottom: look at everything that was given, print the plan, load, loop, save, report. Each of these is a
room of `lorasmith.training_run`, and only these read the training configuration.
"""

from dataclasses import replace

import torch

from lorasmith.cache_folder import Store
from lorasmith.caching import Encoded, cached_encoder, open_store
from lorasmith.config import TrainConfig
from lorasmith.devices import check_device
from lorasmith.errors import UserError
from lorasmith.memory import set_attention, set_compiled, set_gradient_checkpointing, vae_home
from lorasmith.network import Network
from lorasmith.optimizers.base import restore
from lorasmith.processes import Processes, make_deterministic
from lorasmith.training import Stepper
from lorasmith.training_run.encoding import kept_captions, makers_of, trains_text_encoder
from lorasmith.training_run.loading import build_dataset, build_network, load_model
from lorasmith.training_run.objective import objective_of
from lorasmith.training_run.page import describe_plan
from lorasmith.training_run.preparation import Preparation, output_folder, prepare, require_options
from lorasmith.training_run.prior import before_drawing, draw_prior_pictures, missing_prior_pictures, to_draw_note
from lorasmith.training_run.regularizing import regularizers_of
from lorasmith.training_run.resuming import merged_options, run_folder
from lorasmith.training_run.scoring import check_same, load_bench
from lorasmith.training_run.session import Session
from lorasmith.training_run.shared_base import share
from lorasmith.training_state import find_state, load_state
from lorasmith.weight_average import WeightAverage


def run(cfg: TrainConfig) -> int:
    """Train as configured; return the exit code: 0, or 130 / 143 when stopped by Ctrl+C / SIGTERM."""
    state = None
    if cfg.resume is not None:
        cfg, state = merged_options(cfg, run_folder(cfg.resume)), load_state(find_state(cfg.resume))
    require_options(cfg)
    check_device(cfg.training.device)
    processes = Processes(cfg.training.device)
    try:
        with processes.together():
            to_draw = missing_prior_pictures(cfg)
            ready = prepare(before_drawing(cfg) if to_draw else cfg, processes, state)
        if to_draw:
            ready = replace(ready, notes=[*ready.notes, to_draw_note(to_draw)])
        if processes.is_main:
            print(describe_plan(cfg, ready, processes), flush=True)
        if cfg.dry_run:
            return 0
        if to_draw:
            with processes.together():
                draw_prior_pictures(cfg, ready, to_draw, processes)
            with processes.together():
                ready = prepare(cfg, processes, state)
            if processes.is_main:
                print(describe_plan(cfg, ready, processes), flush=True)
        return train(cfg, ready, processes)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UserError(
            f"{processes.device} has too little memory for this. What to try, in this order: --gradient-checkpointing; "
            "--batch-size 1 with --gradient-accumulation; --precision bf16; a lower --resolution; closing other "
            f"programs. ({str(error).strip().partition(chr(10))[0] or type(error).__name__})"
        ) from error
    finally:
        processes.close()


def train(cfg: TrainConfig, ready: Preparation, processes: Processes) -> int:
    """Load the model, train to the last step or until asked to stop, save and report."""
    with processes.together():
        session = _session(cfg, ready, processes)
    return session.run(build_dataset(cfg, ready, session.model, processes, session.stores.get("latents")))


def _session(cfg: TrainConfig, ready: Preparation, processes: Processes) -> Session:
    """Load the model, and put network, optimizer and stepper on it, as a state left them if there is one."""
    device, state = processes.device, ready.state
    make_deterministic(device)
    if processes.is_main and cfg.log.progress:
        print(f"loading {cfg.model.base}", flush=True)
    bench = None
    if processes.is_main and ready.judge is not None:
        bench = load_bench(ready.judge, ready.records, device)
        if state is not None:
            check_same(output_folder(cfg).picture_log, bench, ready.drawings)
    model = load_model(cfg, ready, device)
    if cfg.loss.zero_terminal_snr:
        model.schedule = model.schedule.with_zero_terminal_snr()
    model.vae.to(vae_home(device, caches_latents=all(ready.cached)))
    network = build_network(cfg, ready, model)
    set_attention(model, cfg.training.attention)
    set_gradient_checkpointing(model, cfg.training.gradient_checkpointing)
    if cfg.training.compile is not None:
        set_compiled([model.denoiser, *([model.text_encoder] * trains_text_encoder(ready))], cfg.training.compile)
    stores: dict[Encoded, Store] = {
        kind: open_store(kind, ready.cache, model, maker, device, ready.say)
        for kind, maker in makers_of(cfg, ready, device).items()
        if (any(ready.cached) if kind == "latents" else not trains_text_encoder(ready))
    }
    if ready.is_base_shared:
        assert isinstance(network, Network), "others were refused"
        said = share(model, processes)
        network.to(device)
        if processes.is_main and cfg.log.progress:
            print(said, flush=True)
    groups = network.param_groups(ready.rates.parts, cfg.optimizer.weight_decay_exclude)
    trained = [parameter for group in groups for parameter in group["params"]]
    network.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = ready.rates.optimizer.build(groups, weight_decay=cfg.optimizer.weight_decay)
    stepper = Stepper(
        model,
        trained,
        optimizer,
        processes,
        cached_encoder(model, stores["text"], kept_captions(ready), processes)
        if "text" in stores
        else model.encode_text,
        objective_of(cfg.loss, network.switched_off),
        max_grad_norm=cfg.optimizer.max_grad_norm,
        is_fp16=ready.precision == "fp16",
        regularizers=regularizers_of(cfg, network),
    )
    decay = cfg.training.ema_decay
    average = None if decay is None else WeightAverage(network.named_parameters(), decay)
    if state is not None:
        network.load_state_dict(state.network)
        restore(optimizer, state.optimizer)
        stepper.scaler.load_state_dict(state.scaler)
        if average is not None and state.average is not None:
            average.load_state_dict(state.average)
    return Session(cfg, ready, processes, model, network, optimizer, stepper, average, stores, bench)
