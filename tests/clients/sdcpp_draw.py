"""Draws one picture with stable-diffusion.cpp and prints its log: run as a program, so that a crash is not the tests'.

python sdcpp_draw.py <checkpoint> <picture.png> [<lora>]
"""

import sys

from cyllama.sd import stable_diffusion as engine


def main(checkpoint: str, picture: str, lora: str | None = None) -> None:
    context_options = engine.SDContextParams()
    context_options.model_path = checkpoint
    context_options.n_threads = 2
    context = engine.SDContext(context_options)
    # Not before: the threads that load a model would wait for the interpreter, which waits for them.
    engine.set_log_callback(lambda level, text: print(text, end="", flush=True))
    options = engine.SDImageGenParams()
    options.prompt, options.seed, options.width, options.height = "a cat", 7, 64, 64
    options.sample_params.sample_steps = 1
    if lora:
        options.set_loras([{"path": lora, "multiplier": 1.0}])
    context.generate_with_params(options)[0].to_pil().save(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
