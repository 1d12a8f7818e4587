"""The parts of a pipeline's call: prompts, stages, callbacks, decoding, results, LoRAs and diffusers' methods."""
